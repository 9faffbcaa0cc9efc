/* The first prompts of the report: what each model said, before and after, its tokens coloured by log π_T − log π_θ. */
const LEVELS = [0.1, 0.5, 2];
const MAX_TOKENS = 256;

function tokenClass(ratio) {
  const level = LEVELS.filter((least) => Math.abs(ratio) >= least).length;
  return level ? `${ratio > 0 ? "plus" : "minus"}${level}` : null;
}

/* The text in pieces, one per token; tokens without text become one ■. Ends count characters as Python does, not halves
   of surrogate pairs. Where the text is not the one that the ends were counted in, since something in it was made
   visible or hidden, it stays plain. */
function tokens(text, found) {
  const letters = Array.from(text),
    pieces = [];
  const cut = text.match(/… \((\d+) more characters\)$/),
    length = cut ? letters.length - cut[0].length : letters.length;
  const last = found.ends.at(-1) ?? 0;
  if (!cut && last !== length && found.ends.length < MAX_TOKENS) return [text];
  let start = 0,
    silent = [];
  const said = (ratio) => `log π_T − log π_θ = ${ratio > 0 ? "+" : ""}${number(ratio)}`;
  const endSilence = () => {
    if (!silent.length) return;
    const mean = silent.reduce((sum, each) => sum + each, 0) / silent.length,
      count = silent.length > 1 ? `×${silent.length}` : "";
    pieces.push(
      el(
        "span",
        { class: tokenClass(mean), title: `tokens without text, such as the end of the response: ${said(mean)}` },
        `■${count}`,
      ),
    );
    silent = [];
  };
  found.ends.forEach((end, i) => {
    const piece = letters.slice(start, Math.min(end, length)).join(""),
      ratio = found.log_ratios[i];
    if (piece) {
      endSilence();
      pieces.push(el("span", { class: tokenClass(ratio), title: said(ratio) }, piece));
    } else if (end <= start && start < length + 1) silent.push(ratio);
    start = Math.max(start, end);
  });
  endSilence();
  return [...pieces, letters.slice(Math.min(start, letters.length)).join("")];
}

function answer(name, sample) {
  const text = sample.responses[name],
    right = sample.right?.[name],
    found = sample.tokens?.[name];
  const body = text.trim() || found ? (found ? tokens(text, found) : [text]) : ["(an empty response)"];
  return el(
    "div",
    { class: "answer" },
    el(
      "h3",
      {},
      name,
      " ",
      right === undefined ? null : el("span", { class: right ? "gain" : "loss" }, right ? "right" : "wrong"),
    ),
    el("pre", { class: found ? "tokens" : null }, body),
  );
}

function scale() {
  const levels = [
    ["minus3", "below −2"],
    ["minus2", "−0.5"],
    ["minus1", "−0.1"],
    ["plus1", "0.1"],
    ["plus2", "0.5"],
    ["plus3", "above 2"],
  ];
  return el(
    "div",
    { class: "row scale meta" },
    "log π_T − log π_θ of each token, nats:",
    levels.map(([kind, text]) => el("span", { class: kind }, text)),
    "Orange: the teacher finds it less likely than the model that wrote it.",
  );
}

/* Before, after, then the others: the first model is the student that the run made. */
function inOrder(run, names) {
  const [after, ...others] = names,
    teacher = others.filter((name) => name === run.teacher_row);
  const before = others.filter((name) => name !== run.teacher_row);
  return [...before.slice(0, 1), after, ...before.slice(1), ...teacher];
}

function sampleOf(run, sample) {
  const names = inOrder(run, Object.keys(sample.responses));
  return el(
    "div",
    { class: "sample" },
    el(
      "div",
      { class: "prompt" },
      sample.prompt,
      sample.answer ? el("span", { class: "meta" }, ` (expected: ${sample.answer})`) : null,
    ),
    el(
      "div",
      { class: names.length <= 4 ? "answers few" : "answers", style: `--count:${names.length}` },
      names.map((name) => answer(name, sample)),
    ),
  );
}

function samples(run) {
  const found = run.detail?.samples || [];
  if (!found.length) return null;
  return card(
    "Samples, before and after",
    found.some((sample) => Object.keys(sample.tokens || {}).length) ? scale() : null,
    found.map((sample) => sampleOf(run, sample)),
  );
}
