"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const filter = one("#filter"), sort = one("#sort"), only = one("#only"), count = one("#count");
  const dialog = one("#large"), stage = one(".stage"), tell = one(".tell");
  const before = one("#before"), after = one("#after");
  const text = (card, selector) => (one(selector, card)?.textContent ?? "").toLowerCase();
  const cards = all(".card").map((element) => ({
    element,
    list: element.parentElement,
    button: one("button", element),
    // What the data set says of it, and not its scores.
    words: all(".detail h3, .facts dd, .why", element).map((part) => part.textContent.toLowerCase()).join("\n"),
    stands: element.classList.contains("stands"),
    order: Number(element.dataset.order),
    sample: Number(element.dataset.sample),
    values: (element.dataset.values || "").split(" ").map(Number),
    caption: text(element, ".caption"),
    file: text(element, ".file"),
  }));
  const of = new Map(cards.map((card) => [card.element, card]));
  let shown = null;

  const visible = (list) => all(".card:not([hidden])", list).map((element) => of.get(element));

  function narrow() {
    const wanted = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) {
      const fits = wanted.every((word) => card.words.includes(word)) && (!only?.checked || card.stands);
      card.element.hidden = !fits;
    }
    for (const list of all(".cards")) one(".nothing", list.parentElement).hidden = visible(list).length > 0;
    const left = cards.filter((card) => !card.element.hidden).length;
    count.textContent = left === cards.length ? `${left} samples` : `${left} of ${cards.length} samples`;
  }

  function arrange() {
    const key = sort.value, step = key.startsWith("value") ? Number(key.slice(5)) : null;
    const compare = (a, b) => {
      if (step !== null) return b.values[step] - a.values[step] || a.order - b.order;
      if (key === "caption" || key === "file") return a[key].localeCompare(b[key]) || a.order - b.order;
      return a[key] - b[key] || a.order - b.order;
    };
    for (const list of all(".cards")) list.append(...cards.filter((c) => c.list === list).sort(compare).map((c) => c.element));
  }

  function show(card) {
    shown = card;
    stage.replaceChildren(...all(".frame", card.button).map((frame) => frame.cloneNode(true)));
    const detail = one(".detail", card.element).cloneNode(true);
    one("h3", detail).id = "large-name";
    const figures = all(".figures, .curve, .why", card.element).map((part) => part.cloneNode(true));
    one(".of", detail).after(...figures);
    tell.replaceChildren(...detail.childNodes);
    tell.scrollTop = 0;
    const near = visible(card.list), place = near.indexOf(card);
    before.disabled = place <= 0;
    after.disabled = place < 0 || place === near.length - 1;
    if (!dialog.open) dialog.showModal();
  }

  function move(by) {
    const near = visible(shown.list), next = near[near.indexOf(shown) + by];
    if (next) show(next);
  }

  function hide() {
    dialog.close();
  }

  /** The card that lies in the direction of an arrow key. */
  function neighbour(card, key) {
    const near = visible(card.list), place = near.indexOf(card);
    if (key === "ArrowLeft") return near[place - 1];
    if (key === "ArrowRight") return near[place + 1];
    if (key === "Home") return near[0];
    if (key === "End") return near[near.length - 1];
    const here = card.button.getBoundingClientRect(), down = key === "ArrowDown" ? 1 : -1;
    return near
      .map((other) => [other, other.button.getBoundingClientRect()])
      .filter(([, box]) => down * (box.top - here.top) > 4)
      .sort(([, a], [, b]) => down * (a.top - b.top) || Math.abs(a.left - here.left) - Math.abs(b.left - here.left))
      .map(([other]) => other)[0];
  }

  const keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
  for (const card of cards) {
    card.button.addEventListener("click", () => show(card));
    card.button.addEventListener("keydown", (event) => {
      if (!keys.includes(event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      neighbour(card, event.key)?.button.focus();
    });
  }
  filter.addEventListener("input", narrow);
  filter.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    filter.value = "";
    narrow();
  });
  only?.addEventListener("change", narrow);
  sort.addEventListener("change", arrange);
  before.addEventListener("click", () => move(-1));
  after.addEventListener("click", () => move(1));
  one("#close").addEventListener("click", hide);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) hide();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
    else return;
    event.preventDefault();
  });
  dialog.addEventListener("close", () => shown.button.focus());
  one(".tools").hidden = false;
  for (const part of all(".keys")) part.hidden = false;
  narrow();
})();
