// Runs before anything else in a page under test: notes what goes wrong.
window.seen = { errors: [], violations: [] };
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) =>
  seen.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
const error = console.error;
console.error = (...all) => { seen.errors.push(all.join(" ")); error(...all); };
