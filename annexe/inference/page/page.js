// A phrase of the answer under the pointer shows its mask alone, as the legend of the masks does
for (const kind of ["mouseover", "mouseout"]) {
  document.addEventListener(kind, (event) => {
    const phrase = event.target.closest?.(".annexe-answer .phrase");
    if (!phrase) return;
    const legend = document.querySelectorAll("#masks .legend-item");
    legend[phrase.dataset.mask]?.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
  });
}

// The photo of an example comes into view, which on a phone is above
document.addEventListener("click", (event) => {
  if (event.target.closest?.("#examples tr")) {
    document.querySelector("#photo")?.scrollIntoView({ behavior: "smooth", block: "nearest" });
  }
});
