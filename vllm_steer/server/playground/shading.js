"use strict";
// One scale for the shading of all columns.

/**
 * The scale, so that equal colours are equal numbers; centred on the unsteered answers, if there are any.
 * With `apart`, its width is that of the values without each answer's own mean.
 */
function scaleOf(columns, apart) {
  const plain = finite(columns.filter((column) => column.isPlain).flatMap((column) => column.samples.flatMap(({ values }) => values)));
  const centre = meanOf(plain);
  const far = columns.flatMap(({ samples }) => samples).flatMap(({ values }) => {
    const middle = apart ? meanOf(values) : centre;
    return finite(values).map((value) => Math.abs(value - middle));
  }).sort((a, b) => a - b);
  if (!far.length) return undefined;
  // the farthest 2 % share the ends' colour; otherwise one outlier would leave the rest without colour
  return { centre, reach: far[Math.floor(0.98 * (far.length - 1))] || 1, unsteered: plain.length > 0 };
}

/** Shades all columns and writes the legend; `what` says whose projection is shown. */
function shadeAll(columns, apart, what) {
  const scale = scaleOf(columns, apart);
  byId("legend").hidden = !scale;
  if (!scale) return;
  const { reach, unsteered } = scale;
  for (const { samples } of columns) {
    // α shifts a whole reply; without the shift, differences between tokens show
    for (const sample of samples) sample.shade({ centre: apart ? meanOf(sample.values) : scale.centre, reach });
  }
  const centre = apart ? 0 : scale.centre;
  byId("legend-text").textContent = `Shading: ${what}. Centre: ${apart ? "each answer's own mean" : unsteered ? "mean of the unsteered answer" : "zero"}.`;
  [byId("lowest").textContent, byId("centre").textContent, byId("highest").textContent] = [centre - reach, centre, centre + reach].map(shown);
}
