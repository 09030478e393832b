"use strict";
// The versions of the text: a tree, and the path on which Undo and Redo move.
//
// A version is {parent, shared, prompt, promptIds, steps, controls, numTokens, seed, forced}. `steps` are the new words
// as the engine gives them. The first `shared` of them come from the parent. `forced` maps positions to words that the
// user chose.

class Versions {
  constructor(list, describe, onOpen) {
    Object.assign(this, { list, describe, onOpen, all: [], path: [], at: -1, shown: null });
  }

  add(version) {
    version.number = this.all.push(version);
    this.show();
  }

  /** Go to a version. Redo then has nothing to do. */
  open(version) {
    if (version !== this.path[this.at]) {
      this.path = [...this.path.slice(0, this.at + 1), version];
      this.at = this.path.length - 1;
    }
    this.shown = version;
    this.onOpen(version);
    this.show();
  }

  /** Show none: the user changes the prompt. Undo then goes back to the last one. */
  leave() {
    if (this.shown === null) return;
    this.shown = null;
    this.show();
  }

  /** The version to which Undo (-1) or Redo (+1) leads; undefined if there is none. */
  next(by) {
    return this.path[this.shown === null && by < 0 ? this.at : this.at + by];
  }

  move(by) {
    const version = this.next(by);
    if (version === undefined) return;
    this.at = this.shown === null && by < 0 ? this.at : this.at + by;
    this.shown = version;
    this.onOpen(version);
    this.show();
  }

  /** Draw the tree. A branch is a list inside its parent's entry. */
  show() {
    const hadFocus = this.list.contains(document.activeElement);
    const entries = new Map([[null, this.list]]);
    this.list.replaceChildren();
    for (const version of this.all) {
      const isCurrent = version === this.shown;
      const button = element("button", { type: "button", title: describeControls(version.controls) },
        element("b", {}, String(version.number)), ` ${this.describe(version)}`);
      if (isCurrent) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => this.open(version));
      const item = element("li", {}, button);
      const parent = entries.get(version.parent);
      if (parent.tagName === "LI" && parent.lastChild.tagName !== "OL") parent.append(element("ol"));
      (parent.tagName === "LI" ? parent.lastChild : parent).append(item);
      entries.set(version, item);
      if (isCurrent && hadFocus) button.focus();
    }
  }
}
