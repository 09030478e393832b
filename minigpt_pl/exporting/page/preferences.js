"use strict";
// The colours and the size of the letters.

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
