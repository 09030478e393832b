import math

import pytest
import torch
from torch.testing import assert_close

from minigpt_pl import MiniGPT
from minigpt_pl.dropout import Dropout

SMALL = {"vocab_size": 50, "max_length": 12, "embed_dim": 16, "num_heads": 2, "head_dim": 8, "feed_forward_dim": 24}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


def test_the_notebooks_model_has_10_939_168_parameters():
    model = MiniGPT()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["token_embedding"] + count["position_embedding"] == 5_140_480
    assert sum(p.numel() for p in model.blocks[0].attention.parameters()) == 526_080
    assert sum(p.numel() for p in model.blocks[0].feed_forward.parameters()) == 131_584
    assert count["output"] == 5_140_000
    assert sum(p.numel() for p in model.parameters()) == 10_939_168


def test_head_width_is_independent():
    query = MiniGPT(embed_dim=256, num_heads=2).blocks[0].attention.query
    assert query.weight.shape == (512, 256), "two heads of 256, not of 128"
    assert MiniGPT(embed_dim=64, num_heads=4, head_dim=8).blocks[0].attention.query.weight.shape == (32, 64)


def test_returns_logits_and_hidden_states(ids):
    model = MiniGPT(**SMALL).eval()
    logits, hidden = model(ids)
    assert logits.shape == (3, 12, 50) and hidden.shape == (3, 12, 16)
    assert_close(logits, hidden @ model.output.weight.T + model.output.bias)


def test_losses_are_those_of_the_logits(ids):
    model, targets = MiniGPT(**SMALL).eval(), ids.roll(-1, dims=1)
    logits, _ = model(ids)
    options = [{"ignore_index": 3}, {}]
    losses = [torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **o) for o in options]
    assert_close(model.loss(ids, targets, 3), losses[0] * (targets != 3).sum())
    assert_close(model.loss(ids, targets), losses[1] * 36)
    assert_close(model.token_losses(ids, targets).sum(), losses[1].detach() * 36)


def test_embeddings_of_tokens_and_positions_are_added(ids):
    model = MiniGPT(**SMALL)
    assert_close(model.embed(ids), model.token_embedding.weight[ids] + model.position_embedding.weight)


def test_feed_forward_has_a_relu():
    feed_forward, x = MiniGPT(**SMALL).blocks[0].feed_forward, torch.randn(3, 16)
    assert_close(feed_forward(x), feed_forward[2](feed_forward[0](x).clamp(min=0)))


def test_attention_weights_are_0_for_later_positions():
    weights = MiniGPT(**SMALL).blocks[0].attention.attention_weights(torch.randn(1, 3, 16))
    assert (weights[0, 0] > 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_later_tokens_do_not_change_earlier_logits(ids, num_blocks, token_shift):
    model = MiniGPT(**SMALL, num_blocks=num_blocks, token_shift=token_shift).eval()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_fused_attention_equals_the_explicit_mask(ids):
    attention = MiniGPT(**SMALL).blocks[0].attention.double()
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    weights = attention.attention_weights(x)
    assert_close(weights.sum(-1), torch.ones(3, 2, 12, dtype=torch.float64))
    value = attention.value(x).view(3, 12, 2, 8).transpose(1, 2)
    explicit = attention.output((weights @ value).transpose(1, 2).reshape(3, 12, 16))
    assert_close(attention(x), explicit, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("head_dim", "shifted"), [(8, 4), (5, 3), (1, 1)])
def test_with_a_token_shift_half_of_the_channels_come_from_the_token_before(head_dim, shifted):
    attention = MiniGPT(**SMALL | {"head_dim": head_dim}, token_shift=True).blocks[0].attention.double()
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    query, *others = attention.project(x)
    key, value = (states.clone() for states in others)
    for states, own in zip((key, value), others, strict=True):
        for position in range(1, 12):
            states[:, :, position, :shifted] = own[:, :, position - 1, :shifted]
    scores = query @ key.mT / math.sqrt(head_dim)
    weights = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1)
    assert_close(attention.attention_weights(x), weights)
    assert_close(attention(x), attention.merge_heads(weights @ value), atol=1e-12, rtol=0)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("limit", [0, 256], ids=["fused", "explicit"])
def test_attention_in_bf16_stays_within_its_rounding(monkeypatch, limit, token_shift):
    monkeypatch.setattr("minigpt_pl.model.EXPLICIT_LENGTH", limit)
    attention = MiniGPT(**SMALL, token_shift=token_shift).blocks[0].attention
    x = torch.randn(3, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(x)
    exact = attention.double()(x.double())
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().max() < 2**-6 * exact.abs().max() * 2


def test_the_norm_comes_last(ids):
    model = MiniGPT(**SMALL).eval()
    hidden = model(ids)[1]
    assert_close(hidden.mean(-1), torch.zeros(3, 12), atol=1e-5, rtol=0)
    assert_close(hidden.var(-1, unbiased=False), torch.ones(3, 12), atol=1e-2, rtol=0)
    assert model.blocks[0].attention_norm.eps == model.blocks[0].feed_forward_norm.eps == 1e-6


def test_initial_weights_are_keras_weights():
    torch.manual_seed(0)
    model = MiniGPT()
    attention = model.blocks[0].attention
    for weight, limit in [
        (model.token_embedding.weight, 0.05),
        (model.position_embedding.weight, 0.05),
        (attention.query.weight, math.sqrt(6 / (256 + 512))),
        (attention.output.weight, math.sqrt(6 / (512 + 256))),
        (model.output.weight, math.sqrt(6 / (256 + 20_000))),
    ]:
        assert 0.99 * limit < weight.abs().max() <= limit
        assert_close(weight.std().item(), limit / math.sqrt(3), rtol=0.03, atol=0)
    assert not attention.query.bias.any() and not model.output.bias.any()


def test_dropout_only_in_training(ids):
    model = MiniGPT(**SMALL, dropout=0.5)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_dropout_applies_to_the_outputs_of_attention_and_feed_forward():
    block, x = MiniGPT(**SMALL).blocks[0], torch.randn(3, 12, 16)
    block.dropout.forward = lambda x, *seeds: torch.zeros_like(x)  # drops everything
    assert torch.equal(block(x), block.feed_forward_norm(block.attention_norm(x)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_rate_and_mean(p):
    dropout, x = Dropout(p), torch.ones(1001, 999)
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x.bfloat16())
    assert (first == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert second.dtype == torch.bfloat16 and not torch.equal(first == 0, second == 0)
    if p < 0.9:
        assert first.mean().item() == pytest.approx(1, abs=5e-3) and len(first.unique()) == 2
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first)


def test_dropout_of_a_sequence_depends_only_on_its_seed(ids):
    model = MiniGPT(**SMALL, num_blocks=2, dropout=0.5)
    seeds = torch.tensor([5, -(2**60), 7 << 16])
    whole = model.hidden_states(ids, seeds)
    torch.manual_seed(1)  # has no effect
    assert_close(model.hidden_states(ids[1:], seeds[1:]), whole[1:])
    assert not torch.allclose(model.hidden_states(ids[1:], seeds[:2]), whole[1:])


def test_each_dropout_adds_another_number_to_the_seeds(ids):
    model, used = MiniGPT(**SMALL, num_blocks=3), []
    for block in model.blocks:
        block.dropout.forward = lambda x, seeds, offset=0: used.append(seeds + offset) or x
    model.hidden_states(ids, torch.tensor([0, 100, 200]))
    assert torch.stack(used).tolist() == [[number, 100 + number, 200 + number] for number in range(6)]


def test_values_are_dropped_independently():
    """Also those of other layers, sequences and positions whose numbers differ in a single bit."""
    seeds, x = hash((1, 2, 3)) + (torch.arange(256) << 16), torch.ones(256, 4096)
    masks = torch.stack([Dropout(0.1)(x, seeds, layer) for layer in range(8)]) == 0  # (8, B, L * D)
    for axis, size in enumerate(masks.shape):
        distances = [2**k for k in range(13) if 2**k < size]
        for distance in distances:
            both = masks.narrow(axis, distance, size - distance) & masks.narrow(axis, 0, size - distance)
            assert both.double().mean().item() == pytest.approx(0.01, abs=6 * (0.01 / both.numel()) ** 0.5)
        rates = masks.transpose(0, axis).flatten(1).double().mean(1)  # of each layer, sequence or position
        assert (rates - 0.1).abs().max() < 6 * (0.09 * size / masks.numel()) ** 0.5


@pytest.mark.parametrize("with_seeds", [False, True])
def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(ids, with_seeds):
    """With dropout: the backward pass must draw the same values again."""
    gradients, sizes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, kept = MiniGPT(**SMALL, num_blocks=3, dropout=0.3), {}
        model.activation_checkpointing = checkpointing

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(ids, ids, seeds=torch.arange(3) << 16 if with_seeds else None)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes.append(sum(size for storage, size in kept.items() if storage not in weights))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sizes[1] < sizes[0] / 2


def test_tied_embeddings_share_one_weight():
    model = MiniGPT(**SMALL, tie_embeddings=True)
    assert model.output.weight is model.token_embedding.weight
    difference = sum(p.numel() for p in MiniGPT(**SMALL).parameters()) - sum(p.numel() for p in model.parameters())
    assert difference == 50 * 16


def test_an_input_that_is_too_long():
    with pytest.raises(ValueError, match="max_length=12: the input has 13 tokens"):
        MiniGPT(**SMALL)(torch.zeros(1, 13, dtype=torch.long))
