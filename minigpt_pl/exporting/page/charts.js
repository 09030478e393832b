"use strict";
// Bars and curves. Their lengths are set through `element.style`, which the page's security policy allows.

/**
 * The likeliest words as bars, before and after the controls. Each row is a button.
 *
 * rows: [{id, word, before, after, isCurrent, canFollow}], probabilities in [0, 1].
 * Rows with the same ids are only moved, so that a button keeps the keyboard's focus.
 */
function showAlternatives(list, rows, onChoose) {
  const largest = Math.max(...rows.flatMap((row) => [row.before, row.after]));
  const full = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75].find((limit) => largest <= limit) ?? 1; // of a full bar
  const ids = rows.map((row) => row.id).join(" "), hadFocus = list.contains(document.activeElement);
  if (list.dataset.ids !== ids) {
    list.dataset.ids = ids;
    list.replaceChildren(...rows.map((row) => {
      const button = element("button", { type: "button" },
        element("span", { className: "word" }, row.word),
        element("span", { className: "track" },
          element("span", { className: "before" }), element("span", { className: "after" })),
        element("span", { className: "figures" }));
      button.addEventListener("click", () => onChoose(row.id));
      return element("li", {}, button);
    }));
  }
  rows.forEach((row, index) => {
    const button = list.children[index].firstChild;
    button.disabled = !row.canFollow;
    button.setAttribute("aria-current", String(row.isCurrent));
    const figures = `${percent(row.before)} before the controls, ${percent(row.after)} after them`;
    button.setAttribute("aria-label", `${row.isCurrent ? "Chosen: " : "Go on with "}${row.word}, ${figures}`);
    button.querySelector(".before").style.width = `${(100 * row.before) / full}%`;
    button.querySelector(".after").style.width = `${(100 * row.after) / full}%`;
    button.querySelector(".figures").textContent = `${percent(row.before)} → ${percent(row.after)}`;
  });
  if (hadFocus) (list.querySelector(":focus, [aria-current=true]") ?? list.querySelector("button")).focus();
  return full;
}

/**
 * Bars over the words of a text. Positive values stand above the line, negative ones below it.
 *
 * words: strings. values: one number per word. format: number -> text.
 */
function showWordBars(container, words, values, format, name) {
  const largest = Math.max(...values.map(Math.abs), 1e-9), below = values.some((value) => value < 0);
  const tallest = MiniGPT.top(values.map(Math.abs), 3); // these show their numbers
  const columns = words.map((word, index) => {
    const bar = element("span", { className: values[index] < 0 ? "bar below" : "bar" });
    const share = Math.abs(values[index]) / largest;
    bar.style.height = `${(below ? 50 : 100) * share}%`;
    const label = `${word}: ${format(values[index])}`;
    const column = element("span", { className: "column", role: "listitem", title: label, "aria-label": label },
      element("span", { className: "figure" }, tallest.includes(index) ? format(values[index]) : ""),
      element("span", { className: "stage" }, bar), element("span", { className: "word" }, word));
    return column;
  });
  container.replaceChildren(...columns);
  container.className = below ? "word-bars two-sided" : "word-bars";
  container.setAttribute("role", "list");
  container.setAttribute("aria-label", name);
}

/**
 * The losses against the steps, with a vertical line at one step, unless it is null.
 *
 * losses: {train: [[step, loss]...], val: [[step, loss]...]}, in nats per word.
 */
function showLossCurve(container, losses, step) {
  const size = parseFloat(getComputedStyle(container).fontSize);
  const width = Math.max(container.clientWidth, 18 * size), height = 16 * size;
  const left = 3.5 * size, right = width - 5 * size, top = size, bottom = height - 3.2 * size;
  const points = [...losses.train, ...losses.val];
  const lastStep = Math.max(...points.map(([at]) => at), step, 1);
  const values = points.map(([, loss]) => loss).filter(Number.isFinite);
  const smallest = Math.min(...values), largest = Math.max(...values);
  const spacing = [0.1, 0.2, 0.5, 1, 2, 5].find((each) => largest - smallest <= 4 * each) ?? 10;
  const low = Math.floor(smallest / spacing) * spacing, high = Math.max(Math.ceil(largest / spacing) * spacing, low + spacing);
  const x = (at) => left + ((right - left) * at) / lastStep;
  const y = (loss) => bottom - ((bottom - top) * (loss - low)) / (high - low);
  const text = (content, at, to, anchor) => shape("text", { x: at, y: to, "text-anchor": anchor }, content);
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const last = ([, loss]) => loss.toFixed(2);
  const summary = Object.entries({ training: losses.train, "held-out": losses.val }).filter(([, line]) => line.length)
    .map(([name, line]) => `the ${name} loss goes from ${last(line[0])} to ${last(line.at(-1))}`);
  svg.append(shape("title", {}, `Loss by training step: ${summary.join("; ")}.`));
  for (let loss = low; loss < high + spacing / 2; loss += spacing) {
    svg.append(shape("line", { x1: left, x2: right, y1: y(loss), y2: y(loss), class: "grid" }));
    svg.append(text(loss.toFixed(1), left - size / 2, y(loss) + size / 3, "end"));
  }
  for (const at of [0, Math.round(lastStep / 2), lastStep]) svg.append(text(at.toLocaleString("en"), x(at), bottom + 1.3 * size, "middle"));
  svg.append(text("training step; loss in nats per word", (left + right) / 2, bottom + 2.7 * size, "middle"));
  if (step !== null) svg.append(shape("line", { x1: x(step), x2: x(step), y1: top, y2: bottom, class: "marker" }));
  const ends = []; // [y, name] of the lines
  for (const [name, line] of [["train", losses.train], ["held out", losses.val]]) {
    const finite = line.filter(([, loss]) => Number.isFinite(loss));
    if (!finite.length) continue;
    const path = finite.map(([at, loss]) => `${x(at).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    svg.append(shape("polyline", { points: path, class: name === "train" ? "train" : "val" }));
    if (name !== "train") finite.forEach(([at, loss]) => svg.append(shape("circle", { cx: x(at), cy: y(loss), r: size / 4, class: "val" })));
    ends.push([y(finite.at(-1)[1]), name]);
  }
  ends.sort(([one], [other]) => one - other);
  ends.forEach(([at, name], number) => { // the lower name leaves room for the upper one
    svg.append(text(name, right + size / 2, Math.max(at, number && ends[0][0] + 1.2 * size) + size / 3, "start"));
  });
  container.replaceChildren(svg);
}
