// Choices: every `select` writes to `state` and says what changed; a script can set one too.

function select(name, value) {
  state[name] = String(value);
  for (const control of document.querySelectorAll(`select[data-state="${name}"]`)) control.value = String(value);
  changed(name);
}

for (const control of document.querySelectorAll("select[data-state]")) {
  // browsers keep an old choice over a reload
  control.selectedIndex = Math.max(
    0,
    [...control.options].findIndex((option) => option.defaultSelected),
  );
  state[control.dataset.state] = control.value;
  control.addEventListener("change", () => select(control.dataset.state, control.value));
}
