/* The samples: a list of which only the visible rows exist, and the completions of the chosen prompt side by side.
   Everything that comes from the run is set as text, never as HTML. */
(() => {
  const section = document.getElementById("samples");
  if (!section) return;

  const ROW = 58; // height of a row in pixels, as in samples.css
  const LONG = 4000; // characters of a completion before "Show all"
  const RANGES = ["step", "reward", "advantage"];
  // control characters, and those that are invisible or change the direction of the text that follows
  const INVISIBLE =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;
  const form = section.querySelector("form");
  const count = section.querySelector(".sample-count");
  const list = section.querySelector(".sample-list");
  const space = section.querySelector(".sample-space");
  const detail = section.querySelector(".sample-group");

  let runs = [];
  let samples = []; // all, in the order of the run
  let groups = new Map(); // samples by the key of their group
  let shown = []; // what the filters leave, in the chosen order
  let current = null;
  let color = ""; // what tokens are colored by
  let pattern = null; // what the text filter looks for

  // ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function read(run, number) {
    return run.step.map((step, i) => ({
      run: number,
      row: i,
      step,
      rollout: run.rollout[i],
      group: run.group[i],
      index: run.index[i],
      key: [number, step, run.rollout[i], run.group[i]].join(),
      prompt: run.prompts[run.prompt[i]],
      completion: run.completion[i] ?? "",
      reward: Number(run.reward[i] ?? NaN),
      advantage: Number(run.advantage[i] ?? NaN),
      tokens: run.tokens[i] ?? NaN,
      finish: run.finish_reason[i] ?? (run.truncated[i] ? "truncated" : ""),
      source: run.source[i] ?? "",
    }));
  }

  const address = (sample) =>
    `#sample-${runs.length > 1 ? `${sample.run}-` : ""}${sample.step}-${sample.group}-${sample.index}`;

  // ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  /** Calls `found` for each match of `expression`, and `between` for the text around the matches. */
  function split(text, expression, between, found) {
    let end = 0;
    for (const match of text.matchAll(expression)) {
      if (match.index > end) between(text.slice(end, match.index));
      found(match[0]);
      end = match.index + match[0].length;
    }
    if (end < text.length) between(text.slice(end));
  }

  /** Appends text whose invisible characters are shown by their codes. */
  function append(parent, text) {
    split(text, INVISIBLE, (part) => parent.append(part), (character) => {
      const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parent.append(element("span", "sample-invisible", `U+${code}`));
    });
  }

  /** Appends text in which matches of the text filter are marked. */
  function appendMarked(parent, text) {
    if (!pattern) return append(parent, text);
    split(text, pattern, (part) => append(parent, part), (part) => append(parent.appendChild(element("mark")), part));
  }

  function number(value) {
    if (value === null || value === undefined || value === "") return "–";
    if (typeof value === "string" && Number.isNaN(Number(value)) && value !== "NaN") return value;
    const figure = Number(value);
    if (Number.isNaN(figure)) return "NaN";
    if (!Number.isFinite(figure)) return figure > 0 ? "∞" : "−∞";
    const text = Math.abs(figure) >= 1e-3 || figure === 0 ? String(+figure.toFixed(3)) : figure.toExponential(1);
    return text.replace("-", "−");
  }

  const short = (text) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const plural = (amount, word) => `${amount.toLocaleString("en")} ${word}${amount === 1 ? "" : "s"}`;

  // ── Filters ──────────────────────────────────────────────────────────────────────────────────────────────────────

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.trim();
    pattern = text ? new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu") : null;
    const once = pattern && new RegExp(pattern.source, "iu");
    const inPrompt = new Map();
    const matches = (sample) => {
      if (!inPrompt.has(sample.prompt)) inPrompt.set(sample.prompt, once.test(sample.prompt));
      return inPrompt.get(sample.prompt) || once.test(sample.completion);
    };
    const ranges = RANGES.map((name) => [name, wanted[`${name}_min`], wanted[`${name}_max`]]);
    shown = samples.filter(
      (sample) =>
        ranges.every(
          ([name, low, high]) => (low === "" || sample[name] >= Number(low)) && (high === "" || sample[name] <= Number(high)),
        ) &&
        (!wanted.finish || sample.finish === wanted.finish) &&
        (!wanted.source || sample.source === wanted.source) &&
        (!wanted.run || sample.run === Number(wanted.run)) &&
        (!pattern || matches(sample)),
    );
    const by = wanted.sort.replace("-", "");
    const sign = wanted.sort.startsWith("-") ? -1 : 1;
    const rank = (sample) => (Number.isNaN(sample[by]) ? Infinity : sign * sample[by]);
    shown.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b)));
    if (wanted.per === "group") {
      const seen = new Set();
      shown = shown.filter((sample) => !seen.has(sample.key) && seen.add(sample.key));
    }
    const matched = wanted.per === "group" ? plural(shown.length, "prompt") : plural(shown.length, "sample");
    const total = wanted.per === "group" ? groups.size : samples.length;
    count.textContent = shown.length ? `${matched} of ${total.toLocaleString("en")}` : "No sample matches the filters.";
    space.style.height = `${shown.length * ROW}px`;
    remember();
  }

  function refresh() {
    filter();
    list.scrollTop = 0;
    if (shown.length) choose(shown.includes(current) ? current : shown[0], false);
    else draw();
  }

  /** A live report is loaded again and again; the filters stay. */
  function remember() {
    try {
      sessionStorage.setItem(`samples ${location.pathname}`, JSON.stringify(Object.fromEntries(new FormData(form))));
    } catch {} // storage can be forbidden
  }

  function recall() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(`samples ${location.pathname}`)) ?? {};
      for (const [name, value] of Object.entries(kept)) if (form.elements[name]) form.elements[name].value = value;
    } catch {}
  }

  function addChoices(name, choices) {
    const field = form.elements[name];
    for (const [value, text] of choices) field.append(new Option(short(text), value));
    field.parentElement.hidden = choices.length < 2;
  }

  // ── List ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 10);
    space.replaceChildren(...shown.slice(first, last).map((sample, i) => makeRow(sample, first + i)));
    const place = shown.indexOf(current);
    if (place >= first && place < last) list.setAttribute("aria-activedescendant", `sample-row-${place}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function makeRow(sample, place) {
    const row = element("div", "sample-row");
    row.id = `sample-row-${place}`;
    row.style.top = `${place * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(sample === current));
    row.setAttribute("aria-posinset", String(place + 1));
    row.setAttribute("aria-setsize", String(shown.length));
    const facts = row.appendChild(element("div", "sample-facts"));
    facts.append(
      element("b", "", `step ${sample.step}`),
      element("span", "", `reward ${number(sample.reward)}`),
      element("span", sample.advantage > 0 ? "sample-up" : sample.advantage < 0 ? "sample-down" : "", `advantage ${signed(sample.advantage)}`),
      element("span", "", Number.isNaN(sample.tokens) ? "" : plural(sample.tokens, "token")),
    );
    append(row.appendChild(element("div", "sample-line")), form.elements.per.value === "group" ? sample.prompt.slice(-200).trim() : sample.completion.slice(0, 200).trim() || "(empty)");
    row.addEventListener("click", () => choose(sample));
    return row;
  }

  function scrollToCurrent() {
    const top = shown.indexOf(current) * ROW;
    if (top < 0) return;
    if (Math.abs(top - list.scrollTop) > 2 * list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
    else if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  }

  function choose(sample, byUser = true) {
    current = sample;
    scrollToCurrent();
    draw();
    showGroup();
    if (byUser) history.replaceState(null, "", address(sample));
  }

  list.addEventListener("scroll", draw, { passive: true });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves && shown.length) {
      event.preventDefault();
      const place = Math.max(0, Math.min(shown.length - 1, shown.indexOf(current) + moves[event.key]));
      choose(shown[place]);
    } else if (event.key === "Enter") {
      detail.querySelector('[aria-current="true"] .sample-body')?.focus();
    }
  });

  // ── Group ────────────────────────────────────────────────────────────────────────────────────────────────────────

  function showGroup() {
    detail.replaceChildren();
    if (!current) return;
    const members = groups.get(current.key);
    const run = runs[current.run];
    const head = detail.appendChild(element("header"));
    const title = `Step ${current.step}, group ${current.group}` + (runs.length > 1 ? `, ${run.name}` : "");
    const rewards = members.map((sample) => sample.reward);
    const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
    head.append(element("h3", "", title));
    append(
      head.appendChild(element("p", "muted")),
      `${plural(members.length, "completion")}, mean reward ${number(mean)}` + (current.source ? `, from ${short(current.source)}` : ""),
    );
    const prompt = detail.appendChild(element("div", "sample-prompt"));
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "region");
    prompt.setAttribute("aria-label", "Prompt");
    appendLong(prompt, current.prompt);
    const kinds = colors(run);
    if (kinds.length) detail.append(colorChoice(kinds));
    const cards = detail.appendChild(element("div", "sample-cards"));
    cards.append(...members.map((sample) => makeCard(sample, run)));
  }

  function makeCard(sample, run) {
    const card = element("div", "sample-card");
    card.setAttribute("aria-current", String(sample === current));
    const head = card.appendChild(element("div", "sample-facts"));
    const name = head.appendChild(element("a", "", `#${sample.index}`));
    name.href = address(sample);
    head.append(
      element("b", "", `reward ${number(sample.reward)}`),
      element("span", sample.advantage > 0 ? "sample-up" : sample.advantage < 0 ? "sample-down" : "", `advantage ${signed(sample.advantage)}`),
    );
    const body = card.appendChild(element("div", "sample-body"));
    body.tabIndex = 0;
    body.setAttribute("role", "region");
    body.setAttribute("aria-label", `Completion ${sample.index}`);
    if (color && run.logprobs) appendTokens(body, sample, run);
    else if (sample.completion) appendCompletion(body, sample, run);
    else body.append(element("span", "muted", "(empty)"));
    card.append(facts(sample, run));
    return card;
  }

  /** What is known of a sample, as names and values. */
  function facts(sample, run) {
    const i = sample.row;
    const [low, high] = [run.version_min[i], run.version_max[i]];
    const known = [
      ...(Object.keys(run.rewards).length > 1 ? Object.entries(run.rewards).map(([name, values]) => [name, number(values[i])]) : []),
      ...Object.entries(run.extras).filter(([, values]) => values[i] !== null && values[i] !== undefined).map(([name, values]) => [name, number(values[i])]),
      ["tokens", number(sample.tokens)],
      ["finish", short(sample.finish) || "–"],
      ...(low === null || low === undefined ? [] : [["policy version", low === high ? String(low) : `${low} to ${high}`]]),
    ];
    const table = element("dl", "sample-values");
    for (const [name, value] of known) {
      const pair = table.appendChild(element("div"));
      append(pair.appendChild(element("dt")), name);
      appendLong(pair.appendChild(element("dd")), value);
    }
    return table;
  }

  /** Appends a completion, in which observations of the environment are set apart. */
  function appendCompletion(parent, sample, run) {
    let end = 0;
    for (const [i, length] of (run.part_lengths[sample.row] ?? [Infinity]).entries()) {
      const part = parent.appendChild(element("span", i % 2 ? "sample-context" : ""));
      if (i % 2) part.title = "not sampled";
      appendLong(part, sample.completion.slice(end, (end += length)));
    }
  }

  function appendLong(parent, text) {
    if (text.length <= LONG) return appendMarked(parent, text);
    appendMarked(parent, text.slice(0, LONG));
    const rest = parent.appendChild(element("button", "sample-more", `Show all ${text.length.toLocaleString("en")} characters`));
    rest.type = "button";
    rest.addEventListener("click", () => {
      rest.remove();
      appendMarked(parent, text.slice(LONG));
    });
  }

  // ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

  function colors(run) {
    const known = Object.keys(run.logprobs).map((name) => [name, `log-prob of the ${name}`]);
    return known.length > 1 ? [...known, ["ratio", "ratio of trainer to engine"]] : known;
  }

  function colorChoice(kinds) {
    const line = element("div", "sample-colors");
    const label = line.appendChild(element("label", "", "Color tokens by "));
    const field = label.appendChild(element("select"));
    field.append(new Option("nothing", ""), ...kinds.map(([value, text]) => new Option(text, value)));
    field.value = kinds.some(([value]) => value === color) ? color : (color = "");
    field.addEventListener("change", () => {
      color = field.value;
      showGroup();
      detail.querySelector(".sample-colors select").focus();
    });
    if (!color) return line;
    const scale =
      color === "ratio"
        ? [["within 1 %", 0, 1], ["5 %", 1, 1], ["10 %", 2, 1], ["20 %", 3, 1], ["above", 4, 1], ["below", 4, -1]]
        : [["p ≥ 0.9", 0, 0], ["≥ 0.5", 1, 0], ["≥ 0.1", 2, 0], ["≥ 0.01", 3, 0], ["less", 4, 0]];
    const legend = line.appendChild(element("span", "sample-scale"));
    const status = line.appendChild(element("div", "sample-status", "Point at a token, or move with ← and → in a completion."));
    status.setAttribute("role", "status");
    legend.append(...scale.map(([text, level, sign]) => element("span", tokenClass(level, sign), text)));
    return line;
  }

  const tokenClass = (level, sign) => `sample-token sample-level-${level} ${sign < 0 ? "sample-below" : ""}`;
  const levelOf = (value, bounds) => bounds.filter((bound) => value > bound).length;

  /** The values of a token: log-probs by name, and their ratio if both are known. */
  function valuesOf(run, row, place) {
    const found = {};
    for (const [name, rows] of Object.entries(run.logprobs)) {
      const value = rows[row]?.[place];
      if (value !== null && value !== undefined) found[name] = value / 1000;
    }
    if ("engine" in found && "trainer" in found) found.ratio = Math.exp(found.trainer - found.engine);
    return found;
  }

  const isContext = (run, row, place) => run.sampled[row]?.[place] === false;

  function describe(run, row, place) {
    const values = valuesOf(run, row, place);
    const parts = Object.entries(values).map(([name, value]) => `${name} ${value.toFixed(3)}`.replace("-", "−"));
    const missing = isContext(run, row, place) ? "not sampled" : "no log-prob";
    return `token ${place + 1} (id ${run.completion_ids[row][place]}): ${parts.join(", ") || missing}`;
  }

  function appendTokens(body, sample, run) {
    const ids = run.completion_ids[sample.row] ?? [];
    const status = detail.querySelector(".sample-status");
    const tokens = ids.slice(0, LONG).map((id, place) => {
      const value = valuesOf(run, sample.row, place)[color];
      const distance = color === "ratio" ? Math.abs(Math.log(value)) : -value;
      const bounds = color === "ratio" ? [1.01, 1.05, 1.1, 1.2].map(Math.log) : [0.9, 0.5, 0.1, 0.01].map((p) => -Math.log(p));
      const sign = color === "ratio" ? Math.sign(Math.log(value)) : 0;
      const token = element("span", value === undefined ? "sample-token" : tokenClass(levelOf(distance, bounds), sign));
      token.classList.toggle("sample-context", isContext(run, sample.row, place));
      append(token, run.token_texts[id] ?? `⟨${id}⟩`);
      token.title = describe(run, sample.row, place);
      return token;
    });
    let at = -1;
    const point = (place) => {
      tokens[at]?.classList.remove("sample-at");
      at = place;
      tokens[at].classList.add("sample-at");
      status.textContent = `Completion ${sample.index}, ${tokens[at].title}`;
    };
    body.append(...tokens);
    if (ids.length > LONG) body.append(element("span", "muted", ` and ${plural(ids.length - LONG, "token")} more`));
    body.addEventListener("mouseover", (event) => {
      const place = tokens.indexOf(event.target.closest(".sample-token"));
      if (place >= 0) point(place);
    });
    body.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move || !tokens.length) return;
      event.preventDefault();
      point(Math.max(0, Math.min(tokens.length - 1, at + move)));
      tokens[at].scrollIntoView({ block: "nearest" });
    });
  }

  // ── Start ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Opens the sample that the address names, whether or not the filters leave it. */
  function follow() {
    const found = /^#sample-(?:(\d+)-)?(\d+)-(\d+)-(\d+)$/.exec(location.hash);
    if (!found) return false;
    const [run, step, group, index] = found.slice(1).map((text) => Number(text ?? 0));
    const sample = samples.find(
      (each) => each.step === step && each.group === group && each.index === index && each.run === run,
    );
    if (!sample) {
      count.textContent = `The sample of step ${step}, group ${group}, index ${index} is not in this page.`;
    } else {
      if (!shown.includes(sample)) {
        form.reset();
        filter();
      }
      choose(sample, false);
    }
    section.scrollIntoView();
    return Boolean(sample);
  }

  async function start() {
    runs = await unpack(document.getElementById("samples-data").textContent);
    samples = runs.flatMap(read);
    for (const sample of samples) {
      if (!groups.has(sample.key)) groups.set(sample.key, []);
      groups.get(sample.key).push(sample);
    }
    const distinct = (name) => [...new Set(samples.map((sample) => sample[name]))].filter(Boolean).sort();
    addChoices("finish", distinct("finish").map((value) => [value, value]));
    addChoices("source", distinct("source").map((value) => [value, value]));
    addChoices("run", runs.map((run, i) => [String(i), run.name]));
    recall();
    filter();
    if (!follow() && shown.length) choose(shown[0], false);
    let timer;
    form.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(refresh, 100);
    });
    form.addEventListener("reset", () => setTimeout(refresh));
    form.addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("hashchange", follow);
    new ResizeObserver(draw).observe(list);
    section.dataset.ready = "";
  }

  start().catch((error) => {
    count.textContent = `The samples cannot be shown: ${error.message}`;
  });
})();
