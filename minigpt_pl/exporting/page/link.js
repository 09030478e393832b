"use strict";
// The state of the page in its address, and the history as JSON lines.

const LONGEST_PROMPT = 2000; // characters of a prompt in a link
const isWhole = (low, high) => (value) => Number.isInteger(value) && value >= low && value <= high;
const isSeed = isWhole(0, 2 ** 31 - 1), isNumTokens = isWhole(1, 2000);

/** "#prompt=...&temperature=0.8&...&seed=1". A longer prompt than LONGEST_PROMPT is left out. */
function writeHash({ prompt, controls, numTokens, seed }) {
  const fields = new URLSearchParams(prompt.length <= LONGEST_PROMPT ? { prompt } : {});
  for (const { name } of CONTROLS) fields.set(name, controls[name] ?? "null");
  fields.set("num_tokens", numTokens);
  fields.set("seed", seed);
  return `#${fields}`;
}

/** The fields of `writeHash`; those that the hash lacks are missing. Throws an Error with one sentence. */
function readHash(hash, vocabSize) {
  const state = { controls: {} };
  for (const [name, text] of new URLSearchParams(hash.slice(1))) {
    const value = text === "null" ? null : text.trim() === "" ? NaN : Number(text);
    const control = CONTROLS.find((each) => each.name === name);
    const fail = (problem) => {
      throw new Error(`The link is ignored, because ${name.slice(0, 40)}=${text.slice(0, 40)} ${problem}.`);
    };
    if (name === "prompt") state.prompt = text;
    else if (control) {
      if ((value === null && control.off !== null) || !control.isValid(value, vocabSize)) fail(`must be ${control.range}`);
      state.controls[name] = value;
    } else if (name === "num_tokens") {
      if (!isNumTokens(value)) fail("must be a whole number from 1 to 2000");
      state.numTokens = value;
    } else if (name === "seed") {
      if (!isSeed(value)) fail("must be a whole number from 0 to 2147483647");
      state.seed = value;
    } else fail("is not a setting of this page");
  }
  return state;
}

/** A prompt without the white space at its end, as Python's `rstrip`. */
function withoutFinalSpace(prompt) {
  let end = prompt.length;
  while (end > 0 && /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/.test(prompt[end - 1])) end--;
  return prompt.slice(0, end);
}

/** A version as a record of `python -m minigpt_pl.sample format=jsonl`. pieces: the new words with their spaces. */
function toRecord(version, pieces, unknownWords, data) {
  const controls = { ...version.controls, num_tokens: version.numTokens };
  return {
    prompt: version.prompt,
    text: withoutFinalSpace(version.prompt) + pieces.join(""),
    tokens: pieces,
    probabilities: version.steps.map((step) => step.probability),
    ranks: version.steps.map((step) => step.rank),
    entropies: version.steps.map((step) => step.entropy),
    unknown_words: unknownWords,
    settings: { ...data.settings, ...controls, forced_words: version.forced },
    seed: version.seed,
    checkpoint: data.checkpoint,
  };
}
