// What the page does without its server: the arrow keys move along a strip of tokens, where the focused token
// shows the same tooltip as hovering; and a chart is saved as an SVG or PNG file, with its caption.
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

  const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-size", "font-weight"];
  const LINE = 16, SHARP = 3;

  // The words of a caption, each with the colour that it has on the page.
  const words = (node) =>
    [...node.childNodes].flatMap((child) =>
      child.nodeType === Node.TEXT_NODE
        ? child.data.split(/(?<=\s)/).map((word) => [word.replace(/\s+/, " "), getComputedStyle(node).color])
        : child.matches?.(".save") ? [] : words(child));

  const standalone = (figure) => {
    const drawn = figure.querySelector("svg");
    const copy = drawn.cloneNode(true);
    const originals = drawn.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(originals[i]);
      for (const name of STYLES) element.setAttribute(name, style.getPropertyValue(name));
    });
    const { width, height } = drawn.viewBox.baseVal;
    const font = getComputedStyle(drawn.querySelector("text") ?? drawn).fontFamily;
    const measure = Object.assign(document.createElement("canvas").getContext("2d"), { font: `11px ${font}` });
    const lines = [[]];
    let used = 0;
    for (const [word, colour] of words(figure.querySelector("figcaption"))) {
      const size = measure.measureText(word).width;
      if (used && used + size > width) lines.push([]), (used = 0);
      lines.at(-1).push([word, colour]);
      used += size;
    }
    const top = LINE * lines.length;
    const make = (name, attributes) => {
      const element = document.createElementNS(drawn.namespaceURI, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      return element;
    };
    lines.forEach((line, i) => {
      const y = LINE * (i + 0.75) - top;
      const text = make("text", { x: 0, y, "font-size": 11, "font-family": font, "xml:space": "preserve" });
      for (const [word, fill] of line) text.append(Object.assign(make("tspan", { fill }), { textContent: word }));
      copy.append(text);
    });
    const paper = getComputedStyle(document.body).backgroundColor;
    copy.prepend(make("rect", { x: 0, y: -top, width, height: height + top, fill: paper }));
    copy.setAttribute("xmlns", drawn.namespaceURI);
    copy.setAttribute("viewBox", `0 ${-top} ${width} ${height + top}`);
    copy.setAttribute("width", SHARP * width);
    copy.setAttribute("height", SHARP * (height + top));
    return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  };

  const asPng = async (svg) => {
    const address = URL.createObjectURL(svg);
    const image = Object.assign(new Image(), { src: address });
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    canvas.getContext("2d").drawImage(image, 0, 0);
    URL.revokeObjectURL(address);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  };

  document.addEventListener("click", async (event) => {
    const kind = event.target.dataset?.save;
    const figure = event.target.closest?.("figure");
    if (!kind || !figure) return;
    const svg = standalone(figure);
    const href = URL.createObjectURL(kind === "png" ? await asPng(svg) : svg);
    const said = figure.querySelector("svg").getAttribute("aria-label").split(":")[0];
    const caption = figure.querySelector("figcaption").firstChild.textContent.split(":")[0].trim();
    const name = !caption || said.startsWith(caption) ? said : `${said}, ${caption}`;
    Object.assign(document.createElement("a"), { href, download: `${name}.${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  });
}
