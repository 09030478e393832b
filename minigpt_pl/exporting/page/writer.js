"use strict";
// Writes the words of a version, a few at a time, so that the page can react to the user in between.

const SLICE = 25; // milliseconds of computing before the page may react

/** The tokens of a version: the prompt and the first `count` new words. */
function idsOf(version, count = version.steps.length) {
  return [...version.promptIds, ...version.steps.slice(0, count).map((step) => step.id)];
}

/** Let the page react to input. Resolves as soon as it has. */
function pause() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

/** `target` is the version that is being written, or null. It calls onChange() at the start and at the end. */
class Writer {
  constructor(engine, onChange) {
    Object.assign(this, { engine, onChange, target: null });
  }

  stop() {
    if (this.target === null) return;
    this.target = null;
    this.onChange();
  }

  /** Write until there are `count` new words, or the writing is stopped. Resolves to {seconds, isStopped}. */
  async write(target, count, onWord) {
    this.target = target;
    this.onChange();
    const random = MiniGPT.random(target.seed);
    target.steps.forEach(random); // each place has its own random number, also in a branch
    const started = performance.now();
    let sliceStarted = started;
    try {
      const steps = this.engine.generate(idsOf(target), target.controls, random);
      while (this.target === target && target.steps.length < count) {
        const { value: step, done } = steps.next();
        if (done) break;
        target.steps.push(step);
        onWord(step);
        if (performance.now() - sliceStarted < SLICE) continue;
        await pause();
        sliceStarted = performance.now();
      }
      return { seconds: (performance.now() - started) / 1000, isStopped: this.target !== target };
    } finally {
      if (this.target === target) this.stop();
    }
  }
}
