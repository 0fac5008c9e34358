"use strict";
// One scale for the shading of all columns.

/**
 * The scale: equal numbers have equal colours. It is centred on the unsteered answers, if there are any. With `apart`,
 * its width is that of the values without each answer's own mean. `isLower` and `isHigher` say whether there are values
 * beyond its ends.
 */
function scaleOf(columns, apart) {
  const plain = finite(columns.filter((column) => column.isPlain).flatMap((column) => column.samples.flatMap(({ values }) => values)));
  const centre = meanOf(plain);
  const far = columns.flatMap(({ samples }) => samples).flatMap(({ values }) => {
    const middle = apart ? meanOf(values) : centre;
    return finite(values).map((value) => value - middle);
  });
  if (!far.length) return undefined;
  // the farthest 2 % share the ends' colour; otherwise one outlier would leave the rest without colour
  const reach = far.map(Math.abs).sort((a, b) => a - b)[Math.floor(0.98 * (far.length - 1))] || 1;
  return { centre, reach, unsteered: plain.length > 0, isLower: far.some((one) => one < -reach), isHigher: far.some((one) => one > reach) };
}

/** Shades all columns and writes the legend; `what` says whose projection is shown. */
function shadeAll(columns, apart, what) {
  const scale = scaleOf(columns, apart);
  byId("legend").hidden = !scale;
  if (!scale) return;
  const { reach, unsteered, isLower, isHigher } = scale;
  for (const { samples } of columns) {
    // α shifts a whole reply; without the shift, differences between tokens show
    for (const sample of samples) sample.shade({ centre: apart ? meanOf(sample.values) : scale.centre, reach });
  }
  const centre = apart ? 0 : scale.centre;
  byId("legend-text").textContent = `Shading: ${what}. Centre: ${apart ? "each answer's own mean" : unsteered ? "mean of the unsteered answer" : "zero"}.`
    + (isLower || isHigher ? " Beyond an end marked ≤ or ≥, all values have its colour." : "");
  const [low, middle, high] = [centre - reach, centre, centre + reach].map(shown);
  byId("lowest").textContent = isLower ? `≤ ${low}` : low;
  byId("centre").textContent = middle;
  byId("highest").textContent = isHigher ? `≥ ${high}` : high;
}
