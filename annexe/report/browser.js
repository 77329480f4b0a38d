// The error browser. Every state of the page is in the address after "#": what is filtered, sorted, searched and open.
// Texts come from data sets and models, so they only ever reach the page as text nodes.
"use strict";

const PAGE_SIZE = 48, OUTLINE_WIDTH = 1280, NUM_COLORS = 6;
const page = JSON.parse(document.getElementById("page").textContent); // counts of files, verdicts, what has pictures
const find = (selector) => document.querySelector(selector);

// Data: scripts call receive(), since a page opened from disk may load scripts but no other files.

const store = { images: [], rows: [], details: [] }, loading = {};

function receive(name, index, values) {
  store[name][index] = values;
}

function load(name, index) {
  const source = `data/${name}-${index}.js`;
  return (loading[source] ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.onload = () => resolve(store[name][index]);
    script.onerror = () => reject(new Error(`${source} is missing; copy the whole folder of the report`));
    script.src = source;
    document.head.append(script);
  }));
}

async function loadAll(name) {
  const indices = Array.from({ length: page.files[name] }, (_, index) => index);
  return (await Promise.all(indices.map((index) => load(name, index)))).flat();
}

function readImage([stem, photo, aspect, depthRange, depthErrors, analysis, trueAnalysis]) {
  return { stem, photo, aspect, depthRange, depthErrors, analysis, trueAnalysis };
}

function readRow(values, position) {
  const [imageIndex, annotation, id, query, isSentence, targets, groups, ...rest] = values;
  const [verdict, iou, presence, isExact, answer, reference, analysis, isPictured] = rest;
  const image = images[imageIndex];
  return {
    position, image, annotation, id, query, isSentence, targets, groups,
    verdict, iou, presence, isExact, answer, reference, analysis, isPictured,
    key: `${image.stem}/${annotation}/${id}`,
    text: [query, answer, reference, image.stem].join("\n").toLowerCase(),
  };
}

async function detailOf(row) {
  const chunk = await load("details", Math.floor(row.position / page.detailsPerFile));
  return chunk[row.position % page.detailsPerFile];
}

// Filters: of one of them any chosen value will do, and all of them have to be met.

const isHand = (group) => group.endsWith("hand");
const TARGETS = { single: "one target", multi: "several targets", none: "no target" };
const FACETS = [
  { name: "result", title: "Result", valuesOf: (row) => [row.verdict], order: page.verdicts.map(({ name }) => name) },
  { name: "targets", title: "Targets", valuesOf: (row) => [row.targets], order: Object.keys(TARGETS), labels: TARGETS },
  { name: "hand", title: "Hand among the targets", valuesOf: (row) => row.groups.filter(isHand) },
  { name: "category", title: "Object among the targets", valuesOf: (row) => row.groups.filter((g) => !isHand(g)) },
  { name: "query_form", title: "Query", valuesOf: (row) => [row.isSentence ? "sentence" : "phrase"] },
  { name: "answer", title: "Answer", valuesOf: (row) => [row.isExact ? "exact" : "different"] },
  { name: "analysis", title: "Analysis of the photo", valuesOf: (row) => (row.analysis ? [row.analysis] : []) },
  { name: "pictures", title: "Pictures", valuesOf: (row) => [row.isPictured ? "yes" : "no"] },
];
const ORDERS = {
  worst: (first, second) => first.position - second.position,
  best: (first, second) => second.iou - first.iou || first.position - second.position,
  present: (first, second) => second.presence - first.presence || first.position - second.position,
  absent: (first, second) => first.presence - second.presence || first.position - second.position,
  photo: (first, second) => (first.key < second.key ? -1 : 1),
};

function readState() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  return {
    chosen: Object.fromEntries(FACETS.map(({ name }) => [name, parameters.getAll(name)])),
    text: parameters.get("text") ?? "",
    sort: parameters.get("sort") in ORDERS ? parameters.get("sort") : "worst",
    page: Math.max(Math.floor(Number(parameters.get("page"))) || 1, 1),
    query: parameters.get("query"),
  };
}

function address(state, changes = {}) {
  const { chosen, text, sort, page: pageNumber, query } = { ...state, ...changes };
  const parts = new URLSearchParams();
  for (const { name } of FACETS) for (const value of chosen[name] ?? []) parts.append(name, value);
  if (text) parts.set("text", text);
  if (sort !== "worst") parts.set("sort", sort);
  if (pageNumber > 1) parts.set("page", pageNumber);
  if (query) parts.set("query", query);
  return `#${parts}`;
}

const wordsOf = (state) => state.text.toLowerCase().split(/\s+/).filter(Boolean);

function passes(row, state, words, except) {
  const isMet = ({ name, valuesOf }) => {
    const chosen = state.chosen[name];
    return name === except || !chosen.length || valuesOf(row).some((value) => chosen.includes(value));
  };
  return words.every((word) => row.text.includes(word)) && FACETS.every(isMet);
}

// [value, how many queries would be shown for it] of one filter, the others as they are.
function countValues(facet, state) {
  const counts = new Map(), words = wordsOf(state);
  for (const row of rows) {
    const counted = passes(row, state, words, facet.name) ? 1 : 0;
    for (const value of facet.valuesOf(row)) counts.set(value, (counts.get(value) ?? 0) + counted);
  }
  const values = facet.order ? facet.order.filter((value) => counts.has(value)) : [...counts.keys()].sort();
  return values.map((value) => [value, counts.get(value)]);
}

// Building blocks

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made[name] = value;
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

const span = (name, ...children) => element("span", { class: name }, ...children);
const withCommas = (value) => value.toLocaleString("en");
const slotClass = (slot) => `slot-${slot % NUM_COLORS}`;
const spaced = (name) => name.replaceAll("_", " ");
const badge = (verdict) => span(`badge ${page.verdicts.find(({ name }) => name === verdict).tone}`, verdict);
const filled = (masks) => masks.map((mask) => [`mask ${slotClass(mask[0])}`, mask.at(-1)]);

function button(label, target, attributes = {}) {
  return target ? element("a", { class: "button", href: target, ...attributes }, label) : span("button off", label);
}

// A photo under outlines, which are [class, path data] each.
function picture(image, outlines, description, ending = "") {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${OUTLINE_WIDTH} ${OUTLINE_WIDTH / image.aspect}`);
  for (const [name, outline] of outlines) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    path.setAttribute("d", outline);
    svg.append(path);
  }
  const source = `photos/${image.photo}${ending}.webp`;
  const photo = element("img", { src: source, alt: description, loading: "lazy", decoding: "async" });
  return element("div", { class: "picture", style: `aspect-ratio:${image.aspect}` }, photo, svg);
}

// A text with each <MSK_k> as a mark in the color of slot k.
function withSlots(text) {
  const parts = (text || "–").split(/<MSK_(\d+)>/); // text and slots in turn
  return parts.map((part, index) => (index % 2 ? span(`slot ${slotClass(Number(part))}`, `MSK ${part}`) : part));
}

// The list

function renderFacet(facet, state) {
  const counts = countValues(facet, state), chosen = state.chosen[facet.name];
  if (counts.length < 2 && !chosen.length) return null;
  const values = counts.map(([value, count]) => {
    const isChosen = chosen.includes(value);
    const next = isChosen ? chosen.filter((other) => other !== value) : [...chosen, value];
    const attributes = {
      href: address(state, { chosen: { ...state.chosen, [facet.name]: next }, page: 1 }),
      "aria-current": isChosen ? "true" : null,
      class: count ? null : "empty",
    };
    const label = facet.labels?.[value] ?? spaced(value);
    return element("li", {}, element("a", attributes, span("value", label), span("count", withCommas(count))));
  });
  return element("section", { "data-facet": facet.name }, element("h3", {}, facet.title), element("ul", {}, values));
}

function renderFilters(state) {
  const numChosen = FACETS.reduce((sum, { name }) => sum + state.chosen[name].length, state.text ? 1 : 0);
  find("#num-filters").textContent = numChosen ? `(${numChosen})` : "";
  find("#clear").hidden = !numChosen;
  find("#clear").href = address(state, { chosen: {}, text: "", page: 1 });
  if (find("#text") !== document.activeElement) find("#text").value = state.text;
  find("#facets").replaceChildren(...FACETS.map((facet) => renderFacet(facet, state)).filter(Boolean));
}

function renderCard(row, state) {
  const frame = element("div", { class: "frame" }, row.isPictured ? null : "no picture");
  if (row.isPictured) {
    detailOf(row).then((detail) => {
      const outlines = [...filled(detail.predicted), ...detail.true.map((mask) => ["truth", mask.at(-1)])];
      frame.replaceChildren(picture(row.image, outlines, ""));
    }, showError);
  }
  const iou = span("iou", "IoU ", element("b", {}, row.iou.toFixed(2)));
  const badges = element("div", { class: "badges" }, badge(row.verdict), iou);
  const target = address(state, { query: row.key });
  return element("a", { class: "card panel", href: target }, frame, badges, element("p", {}, row.query));
}

function renderList(state) {
  const numPages = Math.max(Math.ceil(shown.length / PAGE_SIZE), 1), current = Math.min(state.page, numPages);
  const visible = shown.slice((current - 1) * PAGE_SIZE, current * PAGE_SIZE);
  const nothing = rows.length ? "No query fits these filters." : "There are no queries.";
  find("#count").textContent = `${withCommas(shown.length)} of ${withCommas(rows.length)} queries`;
  find("#sort").value = state.sort;
  find("#cards").replaceChildren(...visible.map((row) => renderCard(row, state)));
  if (!visible.length) find("#cards").append(element("p", { class: "nothing" }, nothing));
  const turn = (label, target) => {
    const isThere = target >= 1 && target <= numPages;
    return button(label, isThere ? address(state, { page: target }) : null, { onclick: () => scrollTo(0, 0) });
  };
  for (const pager of document.querySelectorAll(".pager")) {
    pager.hidden = numPages === 1;
    const where = `Page ${current} of ${numPages}`;
    pager.replaceChildren(turn("‹ Previous", current - 1), where, turn("Next ›", current + 1));
  }
}

// One query

function legend(masks, nothing) {
  const names = masks.map(([slot, phrase]) => span(`swatch ${slotClass(slot)}`, phrase || `slot ${slot}`));
  return names.length ? names : [span("none", nothing)];
}

function renderPictures(row, detail) {
  const { image } = row;
  if (!row.isPictured) return element("p", { class: "nothing" }, `No pictures of this query. ${page.pictureNote}`);
  const view = (title, notes, content) =>
    element("figure", {}, content, element("figcaption", {}, element("strong", {}, title), notes));
  const [near, far] = (image.depthRange ?? []).map((distance) => withCommas(Math.round(distance)));
  return element("div", { class: "views" },
    view("Predicted", legend(detail.predicted, "no mask"),
      picture(image, filled(detail.predicted), "Photo with predicted masks")),
    view("True", legend(detail.true, "no target"), picture(image, filled(detail.true), "Photo with true masks")),
    view("Photo", [], picture(image, [], "Photo")),
    near === undefined ? view("True depth", [span("none", "nothing was measured")], null)
      : view("True depth", [span("none", `near ${near} (bright) to far ${far}`)],
        picture(image, [], "True depth map", "-depth")),
  );
}

function renderSlots({ predicted }) {
  if (!predicted.length) return null;
  const text = (value) => (typeof value === "number" ? value.toFixed(2) : value || "–");
  const line = ([slot, phrase, score, iou, on]) => element("tr", {},
    element("th", { scope: "row" }, span(`swatch ${slotClass(slot)}`, `MSK ${slot}`)),
    [phrase, score, iou, on ?? "no object"].map((value) => element("td", {}, text(value))));
  const titles = ["Mask", "Phrase", "Score", "IoU", "Lies on"].map((title) => element("th", { scope: "col" }, title));
  const head = element("thead", {}, element("tr", {}, titles));
  return element("div", { class: "scroll" }, element("table", {}, head, element("tbody", {}, predicted.map(line))));
}

function renderFacts(pairs) {
  const lines = pairs.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return element("dl", { class: "texts" }, lines.flat());
}

function renderTexts(row, detail) {
  const { image } = row;
  const about = [
    ["Analysis", image.analysis || "–"],
    ["true", image.trueAnalysis || "–"],
    ["Targets", row.groups.map(spaced).join(", ") || "none"],
    ["Photo", image.stem],
    ["Annotation", `${row.annotation}, query id ${row.id}`],
  ];
  if (image.depthErrors) {
    const [relative, delta1] = image.depthErrors;
    const share = (100 * delta1).toFixed(1);
    about.push(["Depth", `AbsRel ${relative.toFixed(3)}, δ < 1.25 ${share} %; the predicted map is not kept`]);
  }
  return element("div", {},
    renderFacts([
      ["IoU", row.iou.toFixed(3)],
      ["Presence", row.presence.toFixed(3)],
      ["Answer", [...withSlots(row.answer), row.isExact ? span("same", "✓ exact") : null]],
      ["true", withSlots(row.reference)],
    ]),
    renderSlots(detail),
    renderFacts(about),
  );
}

async function renderQuery(row, state) {
  const detail = await detailOf(row);
  if (readState().query !== row.key) return; // another one was opened meanwhile
  const index = shown.indexOf(row); // -1 if the filters leave it out
  const step = (label, other, id) => button(label, other ? address(state, { query: other.key }) : null, { id });
  const back = address(state, { query: null, page: index < 0 ? 1 : Math.floor(index / PAGE_SIZE) + 1 });
  find("#detail").replaceChildren(
    element("nav", {},
      step("‹ Previous", shown[index - 1], "previous"),
      step("Next ›", index < 0 ? null : shown[index + 1], "next"),
      span("where", index < 0 ? "" : `${withCommas(index + 1)} of ${withCommas(shown.length)}`),
      button("Close", back, { id: "close" })),
    element("div", { class: "badges" },
      badge(row.verdict), span("badge", TARGETS[row.targets]), span("badge", row.isSentence ? "sentence" : "phrase")),
    element("h2", {}, row.query),
    element("div", { class: "body" }, renderPictures(row, detail), renderTexts(row, detail)),
  );
  if (!find("dialog").open) find("dialog").showModal();
  find("dialog").scrollTop = 0;
}

// The page

let images = [], rows = [], shown = [], listed = null;

function render() {
  const state = readState(), list = { ...state, query: null };
  if (address(list) !== listed) {
    const words = wordsOf(list);
    shown = rows.filter((row) => passes(row, list, words)).sort(ORDERS[list.sort]);
    renderFilters(list);
    renderList(list);
    listed = address(list);
  }
  const row = state.query && rows.find(({ key }) => key === state.query);
  if (row) renderQuery(row, state).catch(showError);
  else if (find("dialog").open) find("dialog").close();
}

function showError(error) {
  find("#status").hidden = false;
  find("#status").textContent = error.message;
}

function keyPressed(event) {
  const id = { ArrowLeft: "previous", k: "previous", ArrowRight: "next", j: "next" }[event.key];
  const link = find("dialog").open && id && document.getElementById(id);
  if (!link || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  location.replace(link.href); // the way back leads to the list, not through every query seen
}

async function start() {
  images = (await loadAll("images")).map(readImage);
  rows = (await loadAll("rows")).map(readRow);
  find("#status").hidden = true;
  find("#browser").hidden = false;
  find("#filters").open = matchMedia("(min-width: 60rem)").matches;
  find("#text").oninput = ({ target }) => location.replace(address(readState(), { text: target.value, page: 1 }));
  find("#sort").onchange = ({ target }) => { location.hash = address(readState(), { sort: target.value, page: 1 }); };
  find("#clear").onclick = () => { find("#text").value = ""; };
  find("dialog").oncancel = (event) => { event.preventDefault(); find("#close").click(); };
  find("dialog").onclick = (event) => { if (event.target === find("dialog")) find("#close").click(); };
  addEventListener("hashchange", render);
  addEventListener("keydown", keyPressed);
  render();
}

start().catch(showError);
