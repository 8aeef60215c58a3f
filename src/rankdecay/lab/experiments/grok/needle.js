// The needle and the fan. In the space of matrices with the Frobenius inner product, W spans the radial axis and
//   cos(W, UVᵀ) = ‖W‖_* / (√k ‖W‖_F),   k the number of singular values that are not zero;
// the subgradients UVᵀ + Z have Z across both W and UVᵀ, ‖Z‖_F ≤ √(r−k): a half-angle of arctan √((r−k)/k). The fan is
// drawn in the plane of the page although Z leaves it.

const ZERO = 1e-3; // of σ₁: below it a singular value counts as vanished

function needleAngles(values) {
  const alive = values.filter((value) => value > ZERO * values[0]);
  const r = values.length;
  const k = alive.length;
  if (!k) return { r, k };
  const nuclear = alive.reduce((sum, value) => sum + value, 0);
  const frobenius = Math.sqrt(alive.reduce((sum, value) => sum + value * value, 0));
  const cosine = Math.min(1, nuclear / (Math.sqrt(k) * frobenius));
  return { r, k, cosine, angle: Math.acos(cosine), fan: Math.atan(Math.sqrt((r - k) / k)) };
}

const degrees = (radians) => `${((radians * 180) / Math.PI).toFixed(0)}°`;
const percent = (share) => `${(share * 100).toFixed(0)} %`;

function needleWords({ r, k, cosine, angle, fan }) {
  if (!k) return ["W is zero: it has no direction,", `and every Z with ‖Z‖₂ ≤ 1 is a subgradient (rank 0 of ${r}).`];
  const radial = cosine * cosine;
  return [
    `${k} of ${r} σ above 10⁻³ σ₁`,
    `${degrees(angle)} off W: ${percent(radial)} radial, ${percent(1 - radial)} tangential`,
    k === r ? "full rank: no fan" : `fan ± ${degrees(fan)}`,
  ];
}

function dial(geometry, color, words) {
  const R = 84;
  const at = (angle, radius = R) =>
    `${(radius * Math.cos(angle)).toFixed(2)} ${(-radius * Math.sin(angle)).toFixed(2)}`;
  const { text, muted, rule } = theme();
  let inside = `<circle r="${R}" fill="none" stroke="${rule}"/>`;
  if (!geometry.k) {
    inside += `<circle r="${R}" fill="${color}" fill-opacity="0.18"/><circle r="3.5" fill="${text}"/>`;
  } else {
    const { angle, fan, cosine } = geometry;
    const foot = R * cosine;
    inside +=
      `<line x1="0" y1="0" x2="${R + 14}" y2="0" stroke="${muted}" stroke-dasharray="3 3"/>` +
      `<text x="${R + 18}" y="4">W</text>`;
    if (fan > 0) {
      inside +=
        `<path class="fan" d="M0 0 L${at(angle + fan)} A${R} ${R} 0 ${fan > Math.PI / 2 ? 1 : 0} 1 ${at(angle - fan)} Z"` +
        ` fill="${color}" fill-opacity="0.18"/>`;
    }
    inside +=
      `<line x1="0" y1="0" x2="${foot.toFixed(2)}" y2="0" stroke="${color}" stroke-width="5" stroke-opacity="0.45"/>` +
      `<line x1="${foot.toFixed(2)}" y1="0" x2="${foot.toFixed(2)}" y2="${(-R * Math.sin(angle)).toFixed(2)}"` +
      ` stroke="${color}" stroke-width="2" stroke-opacity="0.6"/>` +
      `<line class="pointer" x1="0" y1="0" x2="${at(angle).split(" ")[0]}" y2="${at(angle).split(" ")[1]}"` +
      ` stroke="${color}" stroke-width="3" stroke-linecap="round"/><circle r="3.5" fill="${text}"/>`;
  }
  const svg = document.createElement("div");
  svg.innerHTML = `<svg class="dial" viewBox="-92 -92 214 184" role="img">${inside}</svg>`;
  svg.firstChild.setAttribute("aria-label", words.join("; "));
  return svg.firstChild;
}

chart("needles", ["step", "seed", "needle"], (element) => {
  const cards = membersNow("singular_values")
    .filter((member) => String(member.seed) === state.seed)
    .map((member) => {
      const values = spectrumOf(member.row, state.needle);
      const card = document.createElement("article");
      card.className = "needle";
      const title = document.createElement("h4");
      title.append(sample(member.arm), run.arms[member.arm].label);
      card.append(title);
      const words = values ? needleWords(needleAngles(values)) : ["This member had left the batch by this step."];
      if (values) card.append(dial(needleAngles(values), armColor(member.arm), words));
      for (const line of words) card.append(Object.assign(document.createElement("p"), { textContent: line }));
      return card;
    });
  element.replaceChildren(...cards);
});
