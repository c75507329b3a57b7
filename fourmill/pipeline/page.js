// A button for the theme, pictures enlarged by a click, and everything unfolded in print.
"use strict";
for (const button of document.querySelectorAll("button.theme")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  });
}
document.addEventListener("click", ({ target }) => {
  if (!target.matches(".row img")) return;
  const box = document.createElement("dialog"), text = document.createElement("p");
  text.textContent = target.alt;
  box.append(target.cloneNode(), text);
  box.addEventListener("click", () => box.close());
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
