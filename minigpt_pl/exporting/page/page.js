"use strict";
// The page: what happens when the user types, clicks or moves a slider. engine.js computes, the other files draw.

const TAIL = 20000; // characters at the end of a prompt that the page reads
const SLICE = 25; // milliseconds of computing before the page may react

/** Let the page react to input. Resolves as soon as it has. */
function pause() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

/** Start the page with the data of the run and its engine. */
function startPage(data, engine) {
  const vocabSize = engine.vocabulary.length;
  const nameOf = (id) => engine.vocabulary[id] || "(padding)";
  const idsOf = (version, count = version.steps.length) =>
    [...version.promptIds, ...version.steps.slice(0, count).map((step) => step.id)];
  const piecesOf = (version) => version.steps.map((step) => engine.piece(step.id));

  let version; // the text on the page
  let tokens = []; // the prompt as words
  let selected = null; // index of a new word; null means the next word
  let isKept = false; // whether the mouse leaves the selection alone
  let place = null; // what the panel shows: {version, at, ids, logits}, for the new word at index `at`
  let promptTimer; // reads the prompt after a pause in typing
  let running = null; // the version that is being written
  let explained = null; // id of the word whose logit is explained; null means the selected or the likeliest one
  let numTokens = Math.min(data.settings.num_tokens, 2000), seed = newSeed();

  const say = (text) => { byId("status").textContent = text; };
  const panel = new ControlPanel(byId("controls"), data.settings, vocabSize, () => {
    showPanel();
    showState();
  });
  const panelB = new ControlPanel(byId("controls-b"), { ...data.settings, temperature: 1.2 }, vocabSize, () => {});
  const words = new WordList(byId("words"), (index, keep) => {
    if (isKept && !keep) return;
    select(index, keep);
  });
  const versions = new Versions(byId("versions"), describeVersion, showVersion);

  // ------------------------------------------------------------------------------------------------ prompt

  function newSeed() {
    return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  }

  /** The words of the prompt that count. A long prompt is cut at white space. */
  function readPrompt(prompt) {
    if (prompt.length <= TAIL) return engine.tokenize(prompt);
    const tail = prompt.slice(-TAIL), space = tail.search(/[ \t\n\v\f\r]/);
    return engine.tokenize(tail.slice(Math.max(0, space)));
  }

  /** What is wrong with the prompt; "" if nothing is. */
  function promptProblem() {
    if (!tokens.length) return "Type the start of a text.";
    return tokens.every((token) => token.unknown) ? "The model knows none of these words. Use more common ones." : "";
  }

  function showPrompt() {
    const prompt = version.prompt, shown = tokens.slice(-engine.maxLength);
    byId("chips").replaceChildren(...shown.map((token) => {
      const chip = element("span", { role: "listitem", className: token.unknown ? "unknown" : "" }, token.text);
      if (token.unknown) {
        chip.title = "not in the vocabulary";
        chip.append(element("span", { className: "for-readers" }, " (not in the vocabulary)"));
      }
      return chip;
    }));
    const unknown = shown.filter((token) => token.unknown).length, sentences = [promptProblem()];
    if (tokens.length > engine.maxLength) sentences.push(`Only the last ${engine.maxLength} words count.`);
    else if (tokens.length) sentences.push(`${tokens.length} ${tokens.length === 1 ? "word" : "words"}.`);
    if (unknown) sentences.push(`Underlined: ${unknown} not in the vocabulary. The model reads each as [UNK].`);
    byId("prompt-state").textContent = sentences.filter(Boolean).join(" ");
    byId("text-prompt").textContent = prompt.length > 2000 ? `… ${prompt.slice(-2000)}` : withoutFinalSpace(prompt);
  }

  /** Show a text without new words. */
  function startDraft(prompt) {
    running = null;
    tokens = readPrompt(prompt);
    versions.leave();
    showVersion({ ...emptyVersion(prompt), promptIds: tokens.map((token) => token.id) });
  }

  function emptyVersion(prompt) {
    return { parent: null, shared: 0, prompt, promptIds: [], steps: [], controls: {}, numTokens, seed, forced: {} };
  }

  /** Read what the user typed just now. */
  function readTyped() {
    clearTimeout(promptTimer);
    if (version.prompt !== byId("prompt").value) startDraft(byId("prompt").value);
  }

  // ------------------------------------------------------------------------------------------------ text

  function describeVersion(each) {
    const position = each.shared, step = each.steps[position];
    const start = (list) => list.slice(0, 8).join("").trim();
    if (each.isEnded) return `ends after word ${position}`;
    if (each.parent === null) return `${withoutFinalSpace(each.prompt).slice(-40)} … ${start(piecesOf(each))}`;
    const replaced = each.parent.steps[position];
    if (!(position in each.forced)) return `goes on after word ${position}: ${start(piecesOf(each).slice(position))}`;
    return `word ${position + 1}: “${engine.piece(step.id).trim()}”${replaced ? ` instead of “${engine.piece(replaced.id).trim()}”` : ""}`;
  }

  function showVersion(next) {
    if (running !== next) running = null;
    version = next;
    if (byId("prompt").value !== version.prompt) {
      byId("prompt").value = version.prompt;
      tokens = readPrompt(version.prompt);
    }
    showPrompt();
    words.clear();
    version.steps.forEach((step) => words.append(engine.piece(step.id), step));
    select(null, false);
    showButtons();
    showState();
  }

  function showButtons() {
    byId("write").textContent = running ? "Stop" : "Write";
    byId("compare").textContent = running ? "Stop" : "Write both";
    byId("go-on").disabled = running !== null || !version.steps.length;
    byId("undo").disabled = !versions.next(-1);
    byId("redo").disabled = !versions.next(1);
    byId("download").disabled = !versions.all.length;
    byId("no-versions").hidden = versions.all.length > 0;
  }

  /** Write new words until there are `count`, another text starts, or the user stops. Resolves to {seconds, isStopped}. */
  async function run(target, count, onWord) {
    running = target;
    showButtons();
    const random = MiniGPT.random(target.seed);
    target.steps.forEach(random); // each place has its own random number, also in a branch
    const started = performance.now();
    let sliceStarted = started;
    try {
      const steps = engine.generate(idsOf(target), target.controls, random);
      while (running === target && target.steps.length < count) {
        const { value: step, done } = steps.next();
        if (done) break;
        target.steps.push(step);
        onWord(step);
        if (performance.now() - sliceStarted < SLICE) continue;
        await pause();
        sliceStarted = performance.now();
      }
      return { seconds: (performance.now() - started) / 1000, isStopped: running !== target };
    } finally {
      if (running === target) running = null;
      versions.show();
      showButtons();
    }
  }

  /** Add a version, show it and write it. */
  async function write(next, count) {
    versions.add(next);
    versions.open(next);
    if (next.shared in next.forced && next.steps.length > next.shared) select(next.shared, true);
    const before = next.steps.length;
    say("Writing …");
    const { seconds, isStopped } = await run(next, count, (step) => words.append(engine.piece(step.id), step));
    if (version !== next || running) return; // another text has started
    const written = next.steps.length - before;
    const speed = written > 1 ? ` (${Math.round(written / seconds)} words a second)` : "";
    const reason = isStopped ? "Stopped" : next.steps.length < count ? "The model ended the text" : "Finished";
    say(next.isEnded ? "The text ends here." : `${reason} after ${written} new words${speed}.`);
    if (selected === null) showPanel();
  }

  function stop() {
    if (running === null) return;
    running = null;
    showButtons();
  }

  const nextSeed = () => {
    if (byId("new-seed").checked) byId("seed").value = seed = newSeed();
    return seed;
  };

  function writeFromPrompt() {
    if (running) return stop();
    readTyped();
    if (promptProblem()) return say(promptProblem());
    nextSeed();
    const next = { ...emptyVersion(version.prompt), promptIds: version.promptIds, controls: { ...panel.values } };
    write(next, numTokens);
  }

  /** A version that shares the first `shared` new words with the one on the page. */
  function branch(shared, count) {
    const forced = Object.fromEntries(Object.entries(version.forced).filter(([at]) => Number(at) < shared));
    const parent = versions.shown, steps = version.steps.slice(0, shared), controls = { ...panel.values };
    return { ...version, parent, shared, steps, controls, numTokens: count, seed, forced, isEnded: false };
  }

  function goOn() {
    nextSeed();
    const count = version.steps.length + numTokens;
    write(branch(version.steps.length, count), count);
  }

  /** Put this word at the selected place and go on from it. */
  function choose(id) {
    const { at, ids, logits } = place;
    if (id === version.steps[at]?.id) return select(at, true);
    const { probabilities, entropy } = engine.distribution(logits, ids, panel.values);
    const count = at < numTokens ? numTokens : at + 1 + numTokens;
    const next = branch(at, count);
    if (id === engine.endId) return write({ ...next, isEnded: true }, at);
    const rank = 1 + probabilities.reduce((higher, other) => higher + (other > probabilities[id]), 0);
    next.steps.push({ id, probability: probabilities[id], rank, entropy });
    next.forced[at] = engine.piece(id).trim();
    write(next, count);
  }

  // ------------------------------------------------------------------------------------------------ selected word

  function select(index, keep) {
    selected = index;
    isKept = keep;
    words.select(index);
    byId("to-next").hidden = index === null;
    showPanel();
  }

  /** The distribution at the selected place, with the controls as they are now. */
  function showPanel() {
    const at = selected ?? version.steps.length, step = version.steps[selected];
    byId("panel-title").textContent = step ? `Word ${at + 1}: ${nameOf(step.id)}` : "Next word";
    const problem = promptProblem();
    byId("panel-body").hidden = byId("inside").hidden = problem !== "";
    byId("word-facts").textContent = problem;
    if (problem) return;
    const isNew = place?.version !== version || place.at !== at;
    if (isNew) {
      const ids = idsOf(version, at);
      place = { version, at, ids, logits: engine.logits(ids) };
      explained = null;
    }
    const { ids, logits } = place;
    const { probabilities, after, order, entropy, entropyBefore } = engine.distribution(logits, ids, panel.values);
    const shown = [...order];
    if (step && !shown.includes(step.id)) shown.push(step.id);
    const rows = shown.map((id) => ({
      id, word: nameOf(id), before: probabilities[id], after: after[id], isCurrent: step?.id === id,
      canFollow: !data.banned_ids.includes(id),
    }));
    const full = showAlternatives(byId("bars"), rows, choose);
    byId("bar-scale").textContent = `A full bar is ${percent(full)}.`;
    const left = after.reduce((count, probability) => count + (probability > 0), 0);
    byId("entropy").textContent = `Entropy: ${entropyBefore.toFixed(2)} → ${entropy.toFixed(2)} bits. `
      + `${left.toLocaleString("en")} of ${vocabSize.toLocaleString("en")} words can be drawn.`;
    byId("word-facts").textContent = step
      ? `Probability ${percent(step.probability)}, rank ${step.rank.toLocaleString("en")}.`
      : "The model gives each word a probability. The controls change it before one is drawn.";
    if (isNew) scheduleInside(ids, step, shown);
  }

  // ------------------------------------------------------------------------------------------------ inside the block

  let insideTimer;
  function scheduleInside(ids, step, shown) {
    clearTimeout(insideTimer);
    insideTimer = setTimeout(() => showInside(ids, step?.id ?? shown[0], shown), 50);
  }

  function showInside(ids, id, shown) {
    const window = ids.slice(-engine.maxLength), names = window.map(nameOf);
    byId("inside-word").textContent = selected === null
      ? "The next word, as the network sees it from the last word of the text."
      : `Word ${selected + 1}, “${nameOf(id)}”, as the network sees it from the word before it.`;
    const heads = engine.attention(ids).weights.flatMap((block, number, blocks) => block.map((weights, head) => {
      const name = blocks.length > 1 ? `Block ${number + 1}, head ${head + 1}` : `Head ${head + 1}`;
      const bars = element("div");
      showWordBars(bars, names, [...weights], percent, `Attention of ${name}`);
      return [element("h4", {}, name), bars];
    }));
    byId("attention").replaceChildren(...heads.flat());
    showContributions(ids, names, explained ?? id, [...new Set([id, ...shown])]);
  }

  function showContributions(ids, names, id, choices) {
    const parts = engine.contributions(ids, id);
    byId("contributions").hidden = parts === null;
    byId("no-contributions").hidden = parts !== null;
    if (parts === null) return;
    const select = byId("explained");
    select.replaceChildren(...choices.map((choice) => element("option", { value: String(choice) }, nameOf(choice))));
    select.value = String(id);
    select.onchange = () => {
      explained = Number(select.value);
      showContributions(ids, names, explained, choices);
    };
    showWordBars(byId("contribution-bars"), names, [...parts.positions], signed, `Contributions to ${nameOf(id)}`);
    const sum = parts.positions.reduce((total, each) => total + each, 0);
    byId("contribution-sum").textContent = `Through attention ${signed(sum)}, directly from the last word `
      + `${signed(parts.own)}, the same for every text ${signed(parts.bias)}: the logit of “${nameOf(id)}” is `
      + `${signed(sum + parts.own + parts.bias)}.`;
  }

  // ------------------------------------------------------------------------------------------------ two settings

  async function compare() {
    if (running) return stop();
    readTyped();
    if (promptProblem()) return say((byId("difference").textContent = promptProblem()));
    nextSeed();
    const texts = [[panel.values, "text-a"], [panelB.values, "text-b"]].map(([controls, id]) => {
      const made = { ...emptyVersion(version.prompt), promptIds: version.promptIds, controls: { ...controls } };
      byId(id).replaceChildren(element("span", { className: "quiet" }, byId("text-prompt").textContent));
      return { made, text: byId(id), spans: [] };
    });
    say((byId("difference").textContent = "Writing …"));
    for (const { made, text, spans } of texts) {
      versions.add(made);
      const { isStopped } = await run(made, numTokens, (step) => {
        const [space, word] = colouredWord(engine.piece(step.id), step);
        text.append(space, word);
        spans.push(word);
      });
      if (isStopped) break;
    }
    const [a, b] = texts.map(({ made }) => made.steps.map((step) => step.id));
    texts.forEach(({ spans }, number) => spans.forEach((word, at) => {
      if (a[at] !== b[at]) word.classList.add("differs");
      if (a[at] !== b[at]) word.append(element("span", { className: "for-readers" }, " (differs)"));
    }));
    const first = Array.from({ length: Math.max(a.length, b.length) }, (_, at) => a[at] !== b[at]).indexOf(true);
    byId("difference").textContent = first < 0 ? "Both texts are the same."
      : `The first difference is word ${first + 1}. Underlined words differ from the word at the same place.`;
    say(`Both texts are finished. ${byId("difference").textContent}`);
    showButtons();
  }

  // ------------------------------------------------------------------------------------------------ link and history

  let stateTimer;
  function showState() {
    clearTimeout(stateTimer);
    stateTimer = setTimeout(() => {
      const state = { prompt: version.prompt, controls: panel.values, numTokens, seed };
      history.replaceState(null, "", writeHash(state));
    }, 250);
  }

  function readState() {
    let state = { controls: {} };
    try {
      state = readHash(location.hash, vocabSize);
      byId("link-problem").textContent = "";
    } catch (error) {
      byId("link-problem").textContent = error.message;
    }
    byId("link-problem").hidden = byId("link-problem").textContent === "";
    panel.set(state.controls);
    numTokens = state.numTokens ?? numTokens;
    if (state.seed !== undefined) byId("new-seed").checked = false;
    seed = state.seed ?? seed;
    byId("num_tokens").value = numTokens;
    byId("seed").value = seed;
    byId("prompt").value = state.prompt ?? version?.prompt ?? data.prompt;
    startDraft(byId("prompt").value);
  }

  async function copyLink() {
    const left = version.prompt.length > LONGEST_PROMPT ? " It leaves out the prompt, which is too long." : "";
    try {
      await navigator.clipboard.writeText(location.href);
      say(`The link is copied.${left}`);
    } catch {
      say(`The browser does not allow copying. Copy the address of this page instead.${left}`);
    }
  }

  function download() {
    const lines = versions.all.map((each) => {
      const unknown = readPrompt(each.prompt).filter((token) => token.unknown).map((token) => token.text);
      return `${JSON.stringify(toRecord(each, piecesOf(each), unknown, data))}\n`;
    });
    const url = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    element("a", { href: url, download: `${data.name}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // ------------------------------------------------------------------------------------------------ the run

  function showEpochs() {
    const hasLosses = data.losses.train.length + data.losses.val.length > 0, hasTexts = data.epochs.length > 0;
    byId("epochs").hidden = !hasLosses && !hasTexts;
    byId("epoch-texts").hidden = !hasTexts;
    const prompts = [...new Set(data.epochs.map((entry) => entry.prompt))];
    byId("epoch-prompt").append(...prompts.map((prompt) => element("option", { value: prompt }, prompt)));
    byId("epoch-prompts").hidden = prompts.length < 2;
    const show = () => {
      const entries = data.epochs.filter((entry) => entry.prompt === byId("epoch-prompt").value);
      byId("epoch").max = Math.max(0, entries.length - 1);
      byId("epoch-slider").hidden = entries.length < 2;
      const entry = entries[Number(byId("epoch").value)];
      if (entry) {
        const facts = `After epoch ${entry.epoch}, step ${entry.step.toLocaleString("en")}`;
        byId("epoch").setAttribute("aria-valuetext", facts);
        byId("epoch-facts").textContent = `${facts}:`;
        const isStart = entry.text.startsWith(entry.prompt);
        byId("epoch-text").replaceChildren(
          element("span", { className: "quiet" }, isStart ? entry.prompt : ""),
          isStart ? entry.text.slice(entry.prompt.length) : entry.text);
      }
      if (hasLosses) showLossCurve(byId("loss-curve"), data.losses, entry?.step ?? null);
    };
    byId("epoch").max = Math.max(0, data.epochs.length - 1);
    byId("epoch").value = byId("epoch").max; // the last epoch
    byId("epoch").addEventListener("input", show);
    byId("epoch-prompt").addEventListener("change", show);
    new ResizeObserver(show).observe(byId("epochs"));
  }

  function showCard() {
    for (const [heading, rows] of Object.entries(data.card)) {
      const list = Object.entries(rows).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
      byId("card").append(element("div", {}, element("h3", {}, heading), element("dl", {}, ...list)));
    }
  }

  // ------------------------------------------------------------------------------------------------ events

  /** Keep a number input's last valid value. */
  function onNumber(id, isValid, range, use) {
    byId(id).addEventListener("input", () => {
      const value = byId(id).valueAsNumber;
      byId(id).setAttribute("aria-invalid", String(!isValid(value)));
      byId("number-problem").textContent = isValid(value) ? "" : `${range}.`;
      if (isValid(value)) use(value);
      showState();
    });
  }

  const on = (id, action) => byId(id).addEventListener("click", action);
  on("skip", (event) => {
    event.preventDefault(); // the address holds the state
    byId("prompt").focus();
  });
  on("write", writeFromPrompt);
  on("go-on", goOn);
  on("compare", compare);
  on("undo", () => versions.move(-1));
  on("redo", () => versions.move(1));
  on("copy-link", copyLink);
  on("download", download);
  on("to-next", () => select(null, false));
  const setControls = (valueOf) => {
    panel.set(Object.fromEntries(CONTROLS.map((control) => [control.name, valueOf(control)])));
    showPanel();
    showState();
  };
  on("defaults", () => setControls(({ name }) => data.settings[name]));
  on("no-controls", () => setControls(({ off }) => off));
  onNumber("num_tokens", isNumTokens, "Words must be a whole number from 1 to 2000", (value) => { numTokens = value; });
  onNumber("seed", isSeed, "The seed must be a whole number from 0 to 2147483647", (value) => {
    seed = value;
    byId("new-seed").checked = false;
  });
  byId("prompt").addEventListener("input", () => {
    clearTimeout(promptTimer);
    promptTimer = setTimeout(readTyped, 60);
  });
  document.addEventListener("keydown", (event) => {
    const isInField = event.target.matches("input, textarea, select"), isCommand = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && running) stop();
    else if (event.key === "Escape" && selected !== null) select(null, false);
    else if (isCommand && event.key === "Enter" && event.target === byId("prompt")) {
      writeFromPrompt();
    } else if (isCommand && !isInField && event.key === "z") versions.move(event.shiftKey ? 1 : -1);
    else if (isCommand && !isInField && event.key === "y") versions.move(1);
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", readState);

  byId("preferences").hidden = byId("main").hidden = false;
  byId("loading").hidden = true;
  showLegend(byId("legend"));
  showCard();
  readState();
  showEpochs();
}

/** Colours and size of the letters. */
function startPreferences() {
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.theme = byId("theme").value || (isDark.matches ? "dark" : "light");
  };
  isDark.addEventListener("change", apply);
  byId("theme").addEventListener("change", apply);
  apply();
  byId("large").addEventListener("click", () => {
    const isLarge = document.documentElement.classList.toggle("large");
    byId("large").setAttribute("aria-pressed", String(isLarge));
  });
}

try {
  const missing = ["MessageChannel", "ResizeObserver", "URLSearchParams", "matchMedia"].filter((name) => !window[name]);
  if (missing.length) throw new Error(`The browser has no ${missing[0]}. Use Firefox, Chrome, Edge or Safari of 2022 or later.`);
  startPreferences();
  const data = JSON.parse(byId("data").textContent);
  startPage(data, MiniGPT.load(data));
} catch (error) {
  byId("main").hidden = true;
  byId("loading").hidden = false;
  byId("loading").textContent = error.message;
  throw error;
}
