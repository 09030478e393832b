"use strict";
// Elements of the page and numbers as text. All text enters the page as text, never as HTML.

/** A new HTML element, as in element("button", {type: "button", "aria-pressed": "false"}, "Large type"). */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A new SVG element. */
function shape(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);

/** A probability as a percentage with two digits, as in "23 %" or "0.0052 %". */
function percent(probability) {
  if (probability > 0 && probability < 1e-6) return "< 0.0001 %";
  const value = 100 * probability;
  return `${value === 0 || value >= 9.95 ? value.toFixed(0) : Number(value.toPrecision(2))} %`;
}

/** A number with its sign, as in "+0.53" or "−1.20". */
function signed(value) {
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}
