"use strict";
// The sections "Epochs" and "About this run": what the run folder told about the training.

/** The texts of the training, and the losses. Nothing is shown of a run that has neither. */
function showEpochs({ epochs, losses }) {
  const hasLosses = losses.train.length + losses.val.length > 0;
  byId("epochs").hidden = !hasLosses && !epochs.length;
  byId("epoch-texts").hidden = !epochs.length;
  const prompts = [...new Set(epochs.map((entry) => entry.prompt))];
  byId("epoch-prompt").append(...prompts.map((prompt) => element("option", { value: prompt }, prompt)));
  byId("epoch-prompts").hidden = prompts.length < 2;
  const show = () => {
    const entries = epochs.filter((entry) => entry.prompt === byId("epoch-prompt").value);
    byId("epoch").max = Math.max(0, entries.length - 1);
    byId("epoch-slider").hidden = entries.length < 2;
    const entry = entries[Number(byId("epoch").value)];
    if (entry) {
      const facts = `After epoch ${entry.epoch}, step ${entry.step.toLocaleString("en")}`;
      byId("epoch").setAttribute("aria-valuetext", facts);
      byId("epoch-facts").textContent = `${facts}:`;
      const start = entry.text.startsWith(entry.prompt) ? entry.prompt : "";
      const quiet = element("span", { className: "quiet" }, start);
      byId("epoch-text").replaceChildren(quiet, entry.text.slice(start.length));
    }
    if (hasLosses) showLossCurve(byId("loss-curve"), losses, entry?.step ?? null);
  };
  byId("epoch").max = epochs.length;
  byId("epoch").value = epochs.filter((entry) => entry.prompt === prompts[0]).length - 1; // the last epoch
  byId("epoch").addEventListener("input", show);
  byId("epoch-prompt").addEventListener("change", show);
  new ResizeObserver(show).observe(byId("epochs"));
}

function showCard({ card }) {
  for (const [heading, rows] of Object.entries(card)) {
    const list = Object.entries(rows).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
    byId("card").append(element("div", {}, element("h3", {}, heading), element("dl", {}, ...list)));
  }
}
