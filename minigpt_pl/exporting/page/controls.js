"use strict";
// The five sampling controls: a slider, a number and a sentence for each. `off` is the value without effect.

const CONTROLS = [
  {
    name: "temperature", label: "Temperature", off: 1, slider: { min: 0, max: 2, step: 0.05 },
    isValid: (value) => value >= 0, range: "0 or more",
    help: "Below 1, likely words win more often. Above 1, there are more surprises. 0 always takes the likeliest word.",
  },
  {
    name: "top_k", label: "Top-k", off: null, slider: { min: 0, max: 100, step: 1 }, // a logarithmic scale
    isValid: (value, vocabSize) => value === null || (Number.isInteger(value) && value >= 1 && value <= vocabSize),
    range: "a whole number from 1 to the number of words in the vocabulary, or empty for all words",
    help: "Draws only from the k likeliest words. Empty means all words.",
  },
  {
    name: "top_p", label: "Top-p", off: 1, slider: { min: 0.01, max: 1, step: 0.01 },
    isValid: (value) => value > 0 && value <= 1, range: "above 0 and at most 1",
    help: "Draws only from the likeliest words that together have this probability.",
  },
  {
    name: "min_p", label: "Min-p", off: 0, slider: { min: 0, max: 1, step: 0.01 },
    isValid: (value) => value >= 0 && value <= 1, range: "0 to 1",
    help: "Drops words with less than this share of the highest probability.",
  },
  {
    name: "repetition_penalty", label: "Repetition penalty", off: 1, slider: { min: 1, max: 2, step: 0.05 },
    isValid: (value) => value > 0.001 && value <= 1000, range: "above 0.001 and at most 1000",
    help: "Above 1, words that the text already has become less likely.",
  },
];

/** The controls as one line, as in "temperature 0.8, top_k 20". */
function describeControls(values) {
  return CONTROLS.map(({ name }) => `${name} ${values[name] ?? "all"}`).join(", ");
}

/** Sliders and numbers of all controls. `values` always holds the last valid value of each. */
class ControlPanel {
  constructor(container, values, vocabSize, onChange) {
    this.values = {};
    this.parts = {};
    this.vocabSize = vocabSize;
    for (const control of CONTROLS) {
      const id = `${container.id}-${control.name}`;
      const slider = element("input", { type: "range", id, ...control.slider, "aria-describedby": `${id}-help` });
      const number = element("input", {
        type: "number", id: `${id}-number`, step: control.slider.step, "aria-label": `${control.label}, as a number`,
        "aria-describedby": `${id}-problem`, placeholder: control.off === null ? "all" : "",
      });
      const problem = element("p", { id: `${id}-problem`, className: "problem", role: "alert" });
      this.parts[control.name] = { control, slider, number, problem };
      container.append(
        element("div", { className: "control" },
          element("label", { htmlFor: id }, control.label), number, slider,
          element("p", { id: `${id}-help`, className: "help" }, control.help), problem),
      );
      slider.addEventListener("input", () => {
        this.set({ [control.name]: this.fromSlider(control, Number(slider.value)) });
        onChange();
      });
      number.addEventListener("input", () => {
        const value = number.value === "" && !number.validity.badInput ? null : number.valueAsNumber;
        const isValid = control.isValid(value ?? control.off, vocabSize) && (value !== null || control.off === null);
        number.setAttribute("aria-invalid", String(!isValid));
        problem.textContent = isValid ? "" : `${control.label} must be ${control.range}.`;
        if (!isValid) return;
        this.values[control.name] = value;
        this.moveSlider(control.name);
        onChange();
      });
    }
    this.set(values);
  }

  /** Show these values. Controls that are not named keep theirs. */
  set(values) {
    for (const { control, number, problem } of Object.values(this.parts)) {
      if (!(control.name in values)) continue;
      this.values[control.name] = values[control.name];
      number.value = values[control.name] ?? "";
      number.setAttribute("aria-invalid", "false");
      problem.textContent = "";
      this.moveSlider(control.name);
    }
  }

  moveSlider(name) {
    const { slider } = this.parts[name], value = this.values[name];
    if (name === "top_k") {
      slider.value = value === null ? 100 : Math.min(99, Math.round((100 * Math.log(value)) / Math.log(this.vocabSize)));
      slider.setAttribute("aria-valuetext", value === null ? "all words" : `${value} words`);
    } else slider.value = value;
  }

  fromSlider(control, value) {
    if (control.name !== "top_k") return value;
    return value === 100 ? null : Math.max(1, Math.round(this.vocabSize ** (value / 100)));
  }
}
