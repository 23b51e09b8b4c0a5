// The arrow keys move along a strip of tokens; the focused token shows the same tooltip as hovering.
() => {
  document.addEventListener("keydown", (event) => {
    const strip = event.target.closest?.(".strip .text");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!strip || !step) return;
    const tokens = [...strip.querySelectorAll(".t")];
    const at = tokens.indexOf(document.activeElement);
    tokens[Math.min(tokens.length - 1, Math.max(0, at + step))]?.focus();
    event.preventDefault();
  });
}
