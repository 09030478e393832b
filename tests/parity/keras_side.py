"""The Keras side of a comparison. Run as a program, since Keras takes its backend once, on import:

    python keras_side.py torch|tensorflow JOB FOLDER

Reads FOLDER/in.json and FOLDER/in.npz, writes FOLDER/out.npz and files of the job's. The model is the seed notebook's
(Apoorv Nandan, "Text generation with a miniature GPT", Apache 2.0), class by class; what differs is marked.
"""

import json
import os
import string
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = sys.argv[1]

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402


def causal_attention_mask(batch_size, n_dest, n_src, dtype):
    i = ops.arange(n_dest)[:, None]
    j = ops.arange(n_src)
    m = i >= j - n_src + n_dest
    mask = ops.cast(m, dtype)
    mask = ops.reshape(mask, [1, n_dest, n_src])
    mult = ops.concatenate([ops.expand_dims(batch_size, -1), ops.convert_to_tensor([1, 1])], 0)
    return ops.tile(mask, mult)


class TransformerBlock(layers.Layer):
    def __init__(self, embed_dim, num_heads, ff_dim, rate=0.1, key_dim=None):
        super().__init__()
        # Differs: key_dim; the notebook's is embed_dim.
        self.att = layers.MultiHeadAttention(num_heads, key_dim or embed_dim)
        self.ffn = keras.Sequential([layers.Dense(ff_dim, activation="relu"), layers.Dense(embed_dim)])
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, inputs):
        if keras.backend.backend() == "tensorflow":
            # Differs: the notebook's mask does not build on TensorFlow since Keras 3.15 ("iterating over a symbolic
            # tf.Tensor"); this is the same mask.
            attention_output = self.att(inputs, inputs, use_causal_mask=True)
        else:
            input_shape = ops.shape(inputs)
            batch_size = input_shape[0]
            seq_len = input_shape[1]
            causal_mask = causal_attention_mask(batch_size, seq_len, seq_len, "bool")
            attention_output = self.att(inputs, inputs, attention_mask=causal_mask)
        attention_output = self.dropout1(attention_output)
        out1 = self.layernorm1(inputs + attention_output)
        ffn_output = self.ffn(out1)
        ffn_output = self.dropout2(ffn_output)
        return self.layernorm2(out1 + ffn_output)


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, maxlen, vocab_size, embed_dim):
        super().__init__()
        self.token_emb = layers.Embedding(input_dim=vocab_size, output_dim=embed_dim)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=embed_dim)

    def call(self, x):
        maxlen = ops.shape(x)[-1]
        positions = ops.arange(0, maxlen, 1)
        positions = self.pos_emb(positions)
        x = self.token_emb(x)
        return x + positions


def create_model(vocab_size, maxlen, embed_dim, num_heads, feed_forward_dim, rate=0.1, key_dim=None, num_blocks=1):
    inputs = layers.Input(shape=(maxlen,), dtype="int32")
    embedding_layer = TokenAndPositionEmbedding(maxlen, vocab_size, embed_dim)
    x = embedding_layer(inputs)
    for _ in range(num_blocks):  # differs: the notebook has one block
        transformer_block = TransformerBlock(embed_dim, num_heads, feed_forward_dim, rate, key_dim)
        x = transformer_block(x)
    outputs = layers.Dense(vocab_size)(x)
    model = keras.Model(inputs=inputs, outputs=[outputs, x])
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss=[loss_fn, None])
    return model


def top_k_probabilities(logits, k):
    """The notebook's `sample_from`, up to the draw."""
    logits, indices = ops.top_k(logits, k=k, sorted=True)
    indices = np.asarray(indices).astype("int32")
    preds = keras.activations.softmax(ops.expand_dims(logits, 0))[0]
    preds = np.asarray(preds).astype("float32")
    return indices, preds


# -------------------------------------------------------------------------------------------------------- jobs


def save(folder, options, arrays):
    """A model with no weight at 0, as `.keras` and `.weights.h5`; its outputs at each length; top-k probabilities."""
    create_model(**options["model"])  # a session with several models: layer names count on
    model = create_model(**options["model"])
    rng = np.random.default_rng(options["seed"])
    # Small, so that the embeddings' variance stays low enough for LayerNorm's epsilon to show.
    model.set_weights([w + rng.normal(0, 0.02, w.shape).astype("float32") for w in model.get_weights()])
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    results = {"layer_names": np.array([layer.name for layer in model.layers])}
    for length in options["lengths"]:
        x = ops.convert_to_tensor(arrays["ids"][:, :length].astype("int32"))
        for layer in model.layers[1:-1]:  # Input insists on maxlen, the layers do not
            x = layer(x, training=False) if isinstance(layer, TransformerBlock) else layer(x)
        results[f"hidden_{length}"] = ops.convert_to_numpy(x)
        results[f"logits_{length}"] = ops.convert_to_numpy(model.layers[-1](x))
    rows = results[f"logits_{options['lengths'][-1]}"][:, -1]  # (B, V)
    results["sample_logits"] = rows
    for k in options["top_k"]:
        for temperature in options["temperatures"]:
            drawn = [top_k_probabilities(ops.convert_to_tensor(row / np.float32(temperature)), k) for row in rows]
            results[f"indices_{k}_{temperature}"] = np.stack([indices for indices, _ in drawn])
            results[f"probabilities_{k}_{temperature}"] = np.stack([probabilities for _, probabilities in drawn])
    return results


def train(folder, options, arrays):
    """`fit`, a step at a time, from the weights in `start.weights.h5`: the loss of each step."""
    model = create_model(**options["model"])
    model.load_weights(folder / "start.weights.h5")
    model.save_weights(folder / "loaded.weights.h5")
    losses = []
    for x, y in zip(arrays["inputs"].astype("int32"), arrays["targets"].astype("int32"), strict=True):
        model.reset_metrics()  # train_on_batch returns the mean since then
        losses.append(float(np.ravel(model.train_on_batch(x, y))[0]))
    return {"losses": np.array(losses)}


def vectorize(folder, options, arrays):
    """`TextVectorization` as the notebook has it, adapted to each group of texts: vocabulary, and all ids of a text."""
    import tensorflow
    import tensorflow.data as tf_data
    import tensorflow.strings as tf_strings

    def custom_standardization(input_string):
        lowercased = tf_strings.lower(input_string)
        stripped_html = tf_strings.regex_replace(lowercased, "<br />", " ")
        return tf_strings.regex_replace(stripped_html, f"([{string.punctuation}])", r" \1")

    def adapted(texts, **settings):
        layer = layers.TextVectorization(standardize=custom_standardization, output_mode="int", **settings)
        layer.adapt(tf_data.Dataset.from_tensor_slices(texts).batch(128))
        return layer

    vocabularies, results = {}, {}
    for group, (texts, max_tokens) in options["groups"].items():
        seeds = adapted(texts, max_tokens=max_tokens, output_sequence_length=options["length"])
        uncut = adapted(texts, max_tokens=max_tokens, ragged=True)  # the ids behind the first 81 tell as much
        vocabularies[group] = seeds.get_vocabulary()
        cut_ids, all_ids = [], []
        for start in range(0, len(texts), 500):
            batch = tensorflow.expand_dims(tensorflow.constant(texts[start : start + 500]), -1)
            cut_ids.append(np.asarray(seeds(batch)))
            all_ids.append(uncut(batch))
        results[f"cut_ids_{group}"] = np.concatenate(cut_ids)
        results[f"all_ids_{group}"] = np.concatenate([np.asarray(ids.flat_values) for ids in all_ids])
        results[f"lengths_{group}"] = np.concatenate([np.asarray(ids.row_lengths(-1)) for ids in all_ids])
    (folder / "vocabularies.json").write_text(json.dumps(vocabularies))
    return results


if __name__ == "__main__":
    job, folder = {"save": save, "train": train, "vectorize": vectorize}[sys.argv[2]], Path(sys.argv[3])
    options = json.loads((folder / "in.json").read_text())
    results = job(folder, options, np.load(folder / "in.npz"))
    np.savez(folder / "out.npz", keras_version=np.array(keras.__version__), **results)
