// The engine of the page: words to ids, ids to logits, logits to a distribution, and what happens inside a block.
// It knows nothing about the page. It follows minigpt_pl: model.py, tokenizer.py, generation/filters.py, and
// generation/engine.py. tests/test_export_html.py compares the two.
//
// Dimensions: L length, D width, H heads, K head width, F hidden width, V vocabulary. Matrices are stored row by row.
//
//   const engine = MiniGPT.load(data)      data: the JSON of the page (minigpt_pl/exporting/html.py). Throws an Error
//                                          with one plain sentence.
//   MiniGPT.random(seed)                   a function that returns numbers in [0, 1), always the same for a seed
//   MiniGPT.top(values, count)             the indices of the largest values, the largest first
//   engine.vocabulary                      array of V strings
//   engine.maxLength, numBlocks, numHeads  sizes of the network
//   engine.unknownId, paddingId, endId     endId is null if the network was trained without [END]
//   engine.tokenize(text)                  [{id, text, unknown, start, end}]: text = the word as typed = [start, end)
//   engine.detokenize(ids)                 the text
//   engine.pieces(ids)                     array of strings; joined they are detokenize(ids)
//   engine.piece(id)                       the word after other words: with the space before it, if it takes one
//   engine.logits(ids)                     Float32Array(V): of the token after the last maxLength ids
//   engine.distribution(logits, ids, controls)
//       {probabilities, entropyBefore}     Float32Array(V) and bits, at temperature 1, without controls
//       {after, entropy}                   the same after the controls
//       {order, orderAfter}                the ten likeliest ids before and after the controls, the likeliest first;
//                                          orderAfter has fewer if the controls leave fewer
//   engine.draw(after, random)             an id
//   engine.generate(ids, controls, random) yields {id, probability, rank, top: [{id, probability}], entropy} without
//                                          end, or until the text ends. probability, rank and top (ten) are those
//                                          before the controls, entropy is that after them. As minigpt_pl.generate.
//   engine.attention(ids)                  {weights}: for each block and head, Float32Array(L): how the last position
//                                          attends to the positions of the window
//   engine.contributions(ids, id)          {positions: Float32Array(L), own, bias}, which add up to the logit of id.
//                                          null if the network has several blocks.
//
// controls: {temperature, top_k, top_p, min_p, repetition_penalty}; missing ones have no effect, as do null, 1 and 0.
// temperature 0 means the likeliest token. ids are all tokens of the text; only the penalty reads more than maxLength.
"use strict";

const MiniGPT = (() => {
  const NORM_EPSILON = 1e-6; // LAYER_NORM_EPSILON of model.py
  const MARKS = "!\"#$%&'()*+,\\-./:;<=>?@\\[\\]^_`{|}~"; // ASCII punctuation without the backslash
  const SPACES = " \\t\\n\\v\\f\\r";
  const WORD = new RegExp(`[${MARKS}][^${MARKS}${SPACES}]*|[^${MARKS}${SPACES}]+`, "gu");
  const TAKES_SPACE = /^(?!$|[.,!?;:)\]}%/]|-[a-z]|'(?:s|t|m|d|re|ve|ll)?$|"$)/;

  // ------------------------------------------------------------------------------------------------ weights

  function decodeBase64(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    return bytes;
  }

  // The weights of each name, as exporting/quantization.py writes them. A vector is fp32. A matrix has one fp32 scale
  // per row. Its first rows are 16-bit integers, the others are 8-bit integers.
  function readTensors(index, bytes) {
    const tensors = {};
    for (const [name, { shape, start, wide }] of Object.entries(index)) {
      const [rows, columns] = shape;
      if (columns === undefined) {
        tensors[name] = new Float32Array(bytes.buffer, start, rows);
        continue;
      }
      const scales = new Float32Array(bytes.buffer, start, rows);
      const long = new Int16Array(bytes.buffer, start + 4 * rows, wide * columns);
      const short = new Int8Array(bytes.buffer, start + 4 * rows + 2 * wide * columns, (rows - wide) * columns);
      const weight = new Float32Array(rows * columns);
      for (let row = 0; row < rows; row++) {
        const [integers, from] = row < wide ? [long, row * columns] : [short, (row - wide) * columns];
        const scale = scales[row];
        for (let i = 0, to = row * columns; i < columns; i++) weight[to + i] = integers[from + i] * scale;
      }
      tensors[name] = weight;
    }
    return tensors;
  }

  function readBlock(tensors, prefix) {
    const layer = (name) => ({ weight: tensors[`${prefix}${name}.weight`], bias: tensors[`${prefix}${name}.bias`] });
    return {
      query: layer("attention.query"), // (H*K, D), as key and value
      key: layer("attention.key"),
      value: layer("attention.value"),
      output: layer("attention.output"), // (D, H*K)
      attentionNorm: layer("attention_norm"), // (D,)
      expand: layer("feed_forward.0"), // (F, D)
      reduce: layer("feed_forward.2"), // (D, F)
      feedForwardNorm: layer("feed_forward_norm"),
    };
  }

  // --------------------------------------------------------------------------------------------- arithmetic

  // The dot product of x and the row of the weight that starts at this index. Four sums are faster than one, because
  // the processor adds to all of them at the same time.
  function dot(weight, start, x) {
    const length = x.length;
    let a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i + 3 < length; i += 4) {
      a += weight[start + i] * x[i];
      b += weight[start + i + 1] * x[i + 1];
      c += weight[start + i + 2] * x[i + 2];
      d += weight[start + i + 3] * x[i + 3];
    }
    for (; i < length; i++) a += weight[start + i] * x[i];
    return a + b + c + d;
  }

  // weight @ x + bias: (rows, columns) @ (columns,) + (rows,) -> (rows,)
  function linear({ weight, bias }, x) {
    const out = new Float32Array(bias.length);
    for (let row = 0; row < out.length; row++) out[row] = bias[row] + dot(weight, row * x.length, x);
    return out;
  }

  // The output layer takes most of the time. Its weight is stored in groups of eight columns: first eight columns of all
  // rows, then the next eight. The loop keeps eight values of x in variables, so it reads half as much as `linear`.
  // A read costs more than a product, because JavaScript checks its bounds. This is 1.6 times as fast as `linear`.
  class OutputLayer {
    constructor(weight, bias) {
      const rows = bias.length;
      this.columns = weight.length / rows;
      this.bias = bias;
      this.groups = new Float32Array(rows * Math.ceil(this.columns / 8) * 8); // the columns that are missing are 0
      for (let column = 0; column < this.columns; column++) {
        const start = (column - (column % 8)) * rows + (column % 8);
        for (let row = 0; row < rows; row++) this.groups[start + row * 8] = weight[row * this.columns + column];
      }
    }

    row(id) {
      const at = (column) => (column - (column % 8)) * this.bias.length + id * 8 + (column % 8);
      return Float32Array.from({ length: this.columns }, (_, column) => this.groups[at(column)]);
    }

    logits(x) {
      const out = this.bias.slice(); // (V,)
      for (let column = 0; column < x.length; column += 8) {
        const values = Array.from({ length: 8 }, (_, i) => x[column + i] ?? 0);
        OutputLayer.#addGroup(this.groups, column * out.length, values, out);
      }
      return out;
    }

    static #addGroup(groups, start, [a, b, c, d, e, f, g, h], out) {
      for (let row = 0, at = start; row < out.length; row++, at += 8) {
        const first = groups[at] * a + groups[at + 1] * b + (groups[at + 2] * c + groups[at + 3] * d);
        out[row] += first + (groups[at + 4] * e + groups[at + 5] * f + (groups[at + 6] * g + groups[at + 7] * h));
      }
    }
  }

  // weight.T @ y for the rows of the weight from firstRow on: (rows, columns), (rows,) -> (columns,)
  function transposed(weight, columns, y, firstRow = 0) {
    const out = new Float32Array(columns);
    for (let row = 0, at = firstRow * columns; row < y.length; row++, at += columns) {
      const factor = y[row];
      if (factor !== 0) for (let i = 0; i < columns; i++) out[i] += factor * weight[at + i];
    }
    return out;
  }

  // Plain loops: a function that is called for each of 20,000 values takes most of the time.
  function sum(x, y) {
    const out = new Float32Array(x.length);
    for (let i = 0; i < out.length; i++) out[i] = x[i] + y[i];
    return out;
  }

  // Layer norm: {output, deviation}. deviation is the number by which the norm divides.
  function normalize({ weight, bias }, x) {
    let mean = 0, variance = 0;
    for (let i = 0; i < x.length; i++) mean += x[i] / x.length;
    for (let i = 0; i < x.length; i++) variance += (x[i] - mean) ** 2 / x.length;
    const deviation = Math.sqrt(variance + NORM_EPSILON);
    const output = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) output[i] = ((x[i] - mean) / deviation) * weight[i] + bias[i];
    return { output, deviation };
  }

  // softmax(scores / temperature), for scores of which at least one is above -Infinity
  function softmax(scores, temperature = 1) {
    let largest = -Infinity, total = 0;
    for (let i = 0; i < scores.length; i++) if (scores[i] > largest) largest = scores[i];
    const exponentials = new Float64Array(scores.length);
    for (let i = 0; i < scores.length; i++) {
      if (scores[i] > -Infinity) total += exponentials[i] = Math.exp((scores[i] - largest) / temperature);
    }
    const probabilities = new Float32Array(scores.length);
    for (let i = 0; i < scores.length; i++) probabilities[i] = exponentials[i] / total;
    return probabilities;
  }

  // in bits
  function entropy(probabilities) {
    let nats = 0;
    for (let i = 0; i < probabilities.length; i++) {
      if (probabilities[i] > 0) nats -= probabilities[i] * Math.log(probabilities[i]);
    }
    return nats / Math.LN2;
  }

  // The indices of the largest values, the largest first. Of equal values the first counts as larger.
  function top(values, count) {
    const best = [];
    let smallest = -Infinity;
    for (let i = 0; i < values.length; i++) {
      if (best.length === count && !(values[i] > smallest)) continue;
      let at = best.length;
      while (at > 0 && values[i] > values[best[at - 1]]) at--;
      best.splice(at, 0, i);
      if (best.length > count) best.pop();
      smallest = values[best[best.length - 1]];
    }
    return best;
  }

  // 1 for the index of the largest value
  function rank(values, index) {
    let larger = 0;
    for (let i = 0; i < values.length; i++) if (values[i] > values[index]) larger++;
    return larger + 1;
  }

  // ------------------------------------------------------------------------------------------------ network

  // Parts of the channels of a head: [first row, end, how many positions before their input is].
  function partsOfHead(head, width, shiftedChannels) {
    const first = head * width, middle = first + shiftedChannels;
    return [[first, middle, 1], [middle, first + width, 0]].filter(([from, to]) => from < to);
  }

  // One block at the last of these positions: inputs are L arrays (D,). The keys and values of the positions are never
  // computed, because the block needs them at one position only:
  //   query . (Wk x_j + bk) = (Wk.T query) . x_j + a number that is the same for all j, which the softmax ignores
  //   sum over j of weight_j (Wv x_j + bv) = Wv (sum over j of weight_j x_j) + bv
  // So nothing has to be recomputed when the window slides and all positions change.
  // With a token shift (model.py), a head has two parts, each with its own Wk.T query and its own sum.
  function runBlock(block, numHeads, shiftedChannels, inputs) {
    const x = inputs[inputs.length - 1]; // (D,)
    const query = linear(block.query, x); // (H*K,)
    const width = query.length / numHeads; // K
    const values = new Float32Array(query.length); // (H*K,)
    const weights = [];
    for (let head = 0; head < numHeads; head++) {
      const parts = partsOfHead(head, width, shiftedChannels);
      const scores = new Float64Array(inputs.length); // (L,)
      for (const [from, to, before] of parts) {
        const absorbed = transposed(block.key.weight, x.length, query.subarray(from, to), from); // (D,)
        const ofInputs = inputs.map((input) => dot(input, 0, absorbed) / Math.sqrt(width)); // L
        scores.forEach((_, j) => (scores[j] += ofInputs[Math.max(j - before, 0)]));
      }
      weights.push(softmax(scores)); // (L,)
      for (const [from, to, before] of parts) {
        const mixed = new Float32Array(x.length); // (D,)
        weights[head].forEach((weight, j) => {
          const input = inputs[Math.max(j - before, 0)];
          for (let i = 0; i < mixed.length; i++) mixed[i] += weight * input[i];
        });
        for (let row = from; row < to; row++) {
          values[row] = block.value.bias[row] + dot(block.value.weight, row * x.length, mixed);
        }
      }
    }
    const attended = linear(block.output, values); // (D,)
    const middle = normalize(block.attentionNorm, sum(x, attended)); // (D,)
    const hidden = linear(block.expand, middle.output).map((value) => Math.max(value, 0)); // (F,), ReLU
    const end = normalize(block.feedForwardNorm, sum(middle.output, linear(block.reduce, hidden))); // (D,)
    return { weights, hidden, deviations: [middle.deviation, end.deviation], output: end.output };
  }

  // Layer norm is linear if the number that it divides by is fixed. This is its transposed matrix times y.
  function normTransposed({ weight }, deviation, y) {
    const mean = dot(weight, 0, y) / y.length;
    return y.map((value, i) => (value * weight[i] - mean) / deviation);
  }

  class Engine {
    #words; // word -> id
    #banned;
    #embedding;
    #positions;
    #blocks;
    #output;
    #seen = { ids: [], inputs: [] }; // the last window, and for each block its inputs at each position

    constructor(data) {
      const bytes = decodeBase64(data.weights);
      if (bytes.length !== data.bytes) throw new Error("Some weights are missing; copy this file again.");
      const tensors = readTensors(data.tensors, bytes);
      this.vocabulary = data.vocabulary;
      this.maxLength = data.network.max_length;
      this.numHeads = data.network.num_heads;
      this.numBlocks = data.network.num_blocks;
      this.shiftedChannels = data.network.shifted_channels; // channels of each head that read the input before
      this.paddingId = data.padding_id;
      this.unknownId = data.unknown_id;
      this.endId = data.end_id;
      this.#banned = data.banned_ids;
      this.#words = new Map(data.vocabulary.map((word, id) => [word, id]));
      this.#embedding = tensors["token_embedding.weight"]; // (V, D)
      this.#positions = tensors["position_embedding.weight"]; // (maxLength, D)
      this.#blocks = Array.from({ length: this.numBlocks }, (_, i) => readBlock(tensors, `blocks.${i}.`));
      // With tied embeddings, the output layer has the weight of the token embedding.
      this.#output = new OutputLayer(tensors["output.weight"] ?? this.#embedding, tensors["output.bias"]);
    }

    tokenize(text) {
      // Spaces take the place of <br />, so that the words keep their places in the text.
      const lower = text.replace(/[A-Z]/g, (letter) => letter.toLowerCase()).replaceAll("<br />", "      ");
      return Array.from(lower.matchAll(WORD), ({ 0: word, index: start }) => {
        const id = this.#words.get(word) ?? this.unknownId;
        const end = start + word.length;
        return { id, text: text.slice(start, end), unknown: id === this.unknownId, start, end };
      });
    }

    piece(id) {
      const word = this.vocabulary[id];
      return TAKES_SPACE.test(word) ? ` ${word}` : word;
    }

    pieces(ids) {
      return ids.map((id, i) => (i === 0 ? this.piece(id).replace(/^ /, "") : this.piece(id)));
    }

    detokenize(ids) {
      return this.pieces(ids).join("");
    }

    // Run the last block at the last position of the window. The inputs of positions that have not changed are kept.
    #run(ids) {
      if (ids.length === 0) throw new Error("Give at least one word.");
      const window = ids.slice(-this.maxLength);
      let kept = 0;
      while (kept < window.length && window[kept] === this.#seen.ids[kept]) kept++;
      const inputs = this.#blocks.map((_, number) => (this.#seen.inputs[number] ?? []).slice(0, kept));
      const width = this.#embedding.length / this.vocabulary.length; // D
      let result;
      for (let position = Math.min(kept, window.length - 1); position < window.length; position++) {
        const token = this.#embedding.subarray(window[position] * width, (window[position] + 1) * width);
        inputs[0][position] = sum(token, this.#positions.subarray(position * width, (position + 1) * width));
        this.#blocks.forEach((block, number) => {
          if (number + 1 < this.numBlocks || position + 1 === window.length) {
            result = runBlock(block, this.numHeads, this.shiftedChannels, inputs[number].slice(0, position + 1));
            if (number + 1 < this.numBlocks) inputs[number + 1][position] = result.output;
          }
        });
      }
      this.#seen = { ids: window, inputs };
      return result;
    }

    logits(ids) {
      return this.#output.logits(this.#run(ids).output);
    }

    attention(ids) {
      this.#run(ids);
      const { inputs } = this.#seen;
      const run = (block, number) => runBlock(block, this.numHeads, this.shiftedChannels, inputs[number]);
      return { weights: this.#blocks.map((block, number) => run(block, number).weights) };
    }

    // The logit is a sum over the positions if three things are fixed at their present values: the attention weights,
    // the numbers by which the norms divide, and which hidden units are above 0. Then the network is linear, and
    // `gradient` tells how much a change of the first residual sum changes the logit.
    contributions(ids, id) {
      if (this.numBlocks > 1) return null;
      const { weights, hidden, deviations } = this.#run(ids);
      const [block] = this.#blocks;
      const [inputs] = this.#seen.inputs;
      const x = inputs[inputs.length - 1];
      const row = this.#output.row(id); // (D,)
      const ofSum = normTransposed(block.feedForwardNorm, deviations[1], row); // (D,)
      const ofHidden = transposed(block.reduce.weight, hidden.length, ofSum); // (F,)
      const active = ofHidden.map((value, i) => (hidden[i] > 0 ? value : 0));
      const ofMiddle = sum(ofSum, transposed(block.expand.weight, x.length, active)); // (D,)
      const gradient = normTransposed(block.attentionNorm, deviations[0], ofMiddle); // (D,)

      const ofValues = transposed(block.output.weight, block.value.bias.length, gradient); // (H*K,)
      const width = ofValues.length / this.numHeads; // K
      const positions = new Float32Array(inputs.length);
      weights.forEach((ofPositions, head) => {
        for (const [from, to, before] of partsOfHead(head, width, this.shiftedChannels)) {
          const values = ofValues.subarray(from, to);
          const ofInput = transposed(block.value.weight, x.length, values, from); // (D,)
          const constant = dot(block.value.bias, from, values);
          ofPositions.forEach((weight, j) => {
            const source = Math.max(j - before, 0);
            positions[source] += weight * (dot(inputs[source], 0, ofInput) + constant);
          });
        }
      });
      const bias =
        dot(block.output.bias, 0, gradient) +
        dot(block.attentionNorm.bias, 0, ofMiddle) +
        dot(block.expand.bias, 0, active) +
        dot(block.reduce.bias, 0, ofSum) +
        dot(block.feedForwardNorm.bias, 0, row) +
        this.#output.bias[id];
      return { positions, own: dot(x, 0, gradient), bias };
    }

    // The controls, in the order of generation/filters.py.
    distribution(logits, ids, controls) {
      const { temperature = 1, top_k = null, top_p = 1, min_p = 0, repetition_penalty = 1 } = controls;
      const probabilities = softmax(logits);
      const scores = logits.slice();
      if (repetition_penalty !== 1) {
        for (const id of new Set(ids)) {
          scores[id] = scores[id] < 0 ? scores[id] * repetition_penalty : scores[id] / repetition_penalty;
        }
      }
      for (const id of this.#banned) scores[id] = -Infinity;
      let after;
      if (temperature === 0) {
        after = new Float32Array(scores.length);
        after[top(scores, 1)[0]] = 1;
      } else {
        if (top_k !== null && top_k < scores.length) {
          const limit = kthLargest(scores, top_k);
          for (let i = 0; i < scores.length; i++) if (scores[i] < limit) scores[i] = -Infinity;
        }
        after = softmax(scores, temperature);
        if (top_p < 1) keep(after, smallestOfNucleus(after, top_p));
        if (min_p > 0) keep(after, min_p * after[top(after, 1)[0]]);
      }
      const order = top(probabilities, 10);
      const orderAfter = top(after, 10).filter((id) => after[id] > 0);
      return { probabilities, after, order, orderAfter, entropyBefore: entropy(probabilities), entropy: entropy(after) };
    }

    // Inverse transform sampling.
    draw(after, random) {
      let left = random(), last = 0;
      for (let id = 0; id < after.length; id++) {
        if (after[id] === 0) continue;
        left -= after[id];
        if (left < 0) return id;
        last = id;
      }
      return last; // rounding can leave a rest
    }

    *generate(ids, controls, random) {
      const text = [...ids];
      while (true) {
        const logits = this.logits(text);
        const { probabilities, after, order, entropy } = this.distribution(logits, text, controls);
        const id = this.draw(after, random);
        if (id === this.endId) return;
        const likeliest = order.map((other) => ({ id: other, probability: probabilities[other] }));
        yield { id, probability: probabilities[id], rank: rank(logits, id), top: likeliest, entropy };
        text.push(id);
      }
    }
  }

  // ----------------------------------------------------------------------------------------------- controls

  // Set the probabilities below the limit to 0, and scale the others to a sum of 1.
  function keep(probabilities, limit) {
    let total = 0;
    for (let i = 0; i < probabilities.length; i++) {
      if (probabilities[i] < limit) probabilities[i] = 0;
      total += probabilities[i];
    }
    for (let i = 0; i < probabilities.length; i++) probabilities[i] /= total;
  }

  function kthLargest(values, k) {
    return k <= 100 ? values[top(values, k)[k - 1]] : values.slice().sort()[values.length - k];
  }

  // Sum up the probabilities, the smallest first, while they have at most 1 - p together. The next is the first to stay.
  function smallestOfNucleus(probabilities, p) {
    const ascending = probabilities.slice().sort();
    let total = 0, i = 0;
    while (i + 1 < ascending.length && (total += ascending[i]) <= 1 - p) i++;
    return ascending[i];
  }

  // The generator "mulberry32" by Tommy Ettinger, in the public domain.
  function random(seed) {
    let state = seed;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  return { load: (data) => new Engine(data), random, top };
})();
