// Filters and sorting of what has `data-item`; without scripts the page shows everything, most suspicious first.
(() => {
  "use strict";
  const controls = document.getElementById("controls");
  if (!controls) return;
  const field = (name) => document.getElementById(name);
  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const items = [...document.querySelectorAll("[data-item]")].map((element) => {
    const prompts = element.querySelectorAll(".prompt");
    return {
      element,
      home: element.parentElement,
      outcome: element.dataset.outcome,
      family: element.dataset.family,
      rank: Number(element.dataset.rank),
      score: element.dataset.score === "" ? -Infinity : Number(element.dataset.score),
      lanes: Number(element.dataset.lanes),
      prompt: prompts.length ? fold(prompts[prompts.length - 1].textContent) : "",
    };
  });
  const homes = [...new Set(items.map((item) => item.home))];
  const byRank = (a, b) => a.rank - b.rank;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0); // -Infinity - -Infinity is no number
  const orders = {
    suspicion: byRank,
    score: (a, b) => compare(b.score, a.score) || byRank(a, b),
    "score-rising": (a, b) => compare(a.score, b.score) || byRank(a, b),
    lanes: (a, b) => b.lanes - a.lanes || byRank(a, b),
    prompt: (a, b) => compare(a.prompt, b.prompt) || byRank(a, b),
  };

  const filter = () => {
    const text = fold(field("text").value.trim());
    const outcome = field("outcome").value;
    const family = field("family").value;
    let shown = 0;
    for (const item of items) {
      const wanted =
        (!outcome || item.outcome === outcome) &&
        (!family || item.family === family) &&
        (!text || item.prompt.includes(text));
      item.element.hidden = !wanted;
      shown += wanted;
    }
    for (const home of homes) {
      home.parentElement.hidden = !items.some((item) => item.home === home && !item.element.hidden);
    }
    field("count").textContent = `${shown} of ${items.length} images on this page shown`;
  };
  const sort = () => {
    const sorted = [...items].sort(orders[field("order").value]);
    for (const home of homes) {
      home.append(...sorted.filter((item) => item.home === home).map((item) => item.element));
    }
  };

  let waiting = 0;
  field("text").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  field("outcome").addEventListener("change", filter);
  field("family").addEventListener("change", filter);
  field("order").addEventListener("change", sort);
  field("reset").addEventListener("click", () => {
    field("text").value = field("outcome").value = field("family").value = "";
    field("order").value = "suspicion";
    sort();
    filter();
  });
  controls.hidden = false;
  filter();
  sort(); // a browser may remember what was chosen before the page was loaded anew
})();
