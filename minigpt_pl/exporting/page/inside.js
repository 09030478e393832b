"use strict";
// The section "Inside the block": how one place of the text came to its logits.

class Inside {
  constructor(engine, nameOf) {
    Object.assign(this, { engine, nameOf });
    byId("explained").addEventListener("change", () => this.showContributions(Number(byId("explained").value)));
  }

  /**
   * Show the word after `ids`, as soon as the user rests.
   *
   * choices: ids of the words that can be explained. The first is explained at once.
   * scored: names the place, as in "the next word".
   */
  show(ids, choices, scored) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.ids = ids;
      this.names = ids.slice(-this.engine.maxLength).map(this.nameOf);
      byId("inside-word").textContent = `How the network scores ${scored}, after “${this.names.at(-1)}”.`;
      this.showAttention();
      const options = choices.map((id) => element("option", { value: String(id) }, this.nameOf(id)));
      byId("explained").replaceChildren(...options);
      this.showContributions(choices[0]);
    }, 50);
  }

  showAttention() {
    byId("attention").replaceChildren();
    this.engine.attention(this.ids).weights.forEach((block, number, blocks) => block.forEach((weights, head) => {
      const name = blocks.length > 1 ? `Block ${number + 1}, head ${head + 1}` : `Head ${head + 1}`;
      const bars = element("div");
      showWordBars(bars, this.names, [...weights], percent, `Attention of ${name}`);
      byId("attention").append(element("h4", {}, name), bars);
    }));
  }

  showContributions(id) {
    const parts = this.engine.contributions(this.ids, id), name = this.nameOf(id);
    byId("contributions").hidden = parts === null;
    byId("no-contributions").hidden = parts !== null;
    if (parts === null) return;
    showWordBars(byId("contribution-bars"), this.names, [...parts.positions], signed, `Contributions to ${name}`);
    const sum = parts.positions.reduce((total, each) => total + each, 0);
    byId("contribution-sum").textContent = `Through attention ${signed(sum)}, directly from the last word `
      + `${signed(parts.own)}, the same for every text ${signed(parts.bias)}: the logit of “${name}” is `
      + `${signed(sum + parts.own + parts.bias)}.`;
  }
}
