"use strict";
// The words of a text, coloured by probability. One of them can be selected by mouse, touch or keyboard.

// The lowest probability of each colour. page.css has the colours: .level-0 to .level-5.
const LEVELS = [0.5, 0.2, 0.05, 0.01, 0.001, 0];
const DWELL = 120; // milliseconds that the mouse rests on a word before it is selected

/** The legend of the colours. */
function showLegend(list) {
  list.append(element("li", {}, "Probability of a word:"));
  LEVELS.forEach((lowest, level) => {
    const label = lowest ? `≥ ${percent(lowest)}` : `< ${percent(LEVELS[level - 1])}`;
    list.append(element("li", {}, element("span", { className: `coloured level-${level}` }, label)));
  });
}

/** The space before a word, if any, and the coloured word. */
function colouredWord(piece, step, properties = {}) {
  const space = piece.startsWith(" ") ? " " : "", text = piece.slice(space.length);
  const label = `${text}: probability ${percent(step.probability)}, rank ${step.rank.toLocaleString("en")}`;
  const level = LEVELS.findIndex((lowest) => step.probability >= lowest);
  const className = `coloured level-${level} ${space ? "" : "joined"}`.trim();
  return [space, element("span", { className, title: label, ...properties }, text)];
}

/** A list box of words. It calls onSelect(index, isKept): a click or a key keeps the word, the mouse only shows it. */
class WordList {
  constructor(container, onSelect) {
    this.container = container;
    this.options = [];
    let timer;
    const indexOf = (event) => this.options.indexOf(event.target.closest("[role=option]"));
    container.addEventListener("pointerover", (event) => {
      clearTimeout(timer);
      const index = indexOf(event);
      if (event.pointerType === "mouse" && index >= 0) timer = setTimeout(() => onSelect(index, false), DWELL);
    });
    container.addEventListener("pointerleave", () => clearTimeout(timer));
    container.addEventListener("click", (event) => {
      clearTimeout(timer);
      if (indexOf(event) >= 0) onSelect(indexOf(event), true);
    });
    container.addEventListener("focusin", (event) => {
      if (indexOf(event) >= 0 && event.target.matches(":focus-visible")) onSelect(indexOf(event), true);
    });
    container.addEventListener("keydown", (event) => {
      const index = this.keyTarget(event.key, indexOf(event));
      if (index === undefined) return;
      event.preventDefault();
      this.options[index].focus();
      onSelect(index, true);
    });
  }

  /** The word that a key leads to from the word at `index`. Undefined if the key has no meaning here. */
  keyTarget(key, index) {
    const last = this.options.length - 1;
    if (key === "ArrowLeft") return Math.max(0, index - 1);
    if (key === "ArrowRight") return Math.min(last, index + 1);
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (key === "Enter" || key === " ") return index;
    if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
    const from = this.options[index].getBoundingClientRect(), isUp = key === "ArrowUp";
    const onNextLine = this.options.map((option, at) => [option.getBoundingClientRect(), at])
      .filter(([box]) => (isUp ? box.bottom <= from.top + 2 : box.top >= from.bottom - 2));
    if (!onNextLine.length) return index;
    const distance = ([box]) => Math.abs(box.top - from.top) * 1000 + Math.abs(box.left - from.left);
    return onNextLine.reduce((best, each) => (distance(each) < distance(best) ? each : best))[1];
  }

  clear() {
    this.options = [];
    this.container.replaceChildren();
    this.container.hidden = true; // an empty list box would be an error for a screen reader
  }

  append(piece, step) {
    const [space, word] = colouredWord(piece, step, { role: "option", tabIndex: -1, "aria-selected": "false" });
    word.setAttribute("aria-label", word.title);
    if (!this.options.length) word.tabIndex = 0;
    this.options.push(word);
    this.container.append(space, word);
    this.container.hidden = false;
  }

  /** Mark the word at `index`; null marks none. Tab reaches the marked word, or else the first. */
  select(index) {
    for (const option of this.container.querySelectorAll("[aria-selected=true], [tabindex='0']")) {
      option.setAttribute("aria-selected", "false");
      option.tabIndex = -1;
    }
    if (!this.options.length) return;
    this.options[index ?? 0].tabIndex = 0;
    if (index !== null) this.options[index].setAttribute("aria-selected", "true");
  }
}
