// Before anything is painted: the theme that was chosen, if one was. Not a module, since modules wait for the page.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("alula.theme");
  } catch {
    // storage may be forbidden; the page then follows the system
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
