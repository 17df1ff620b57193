/* A line chart as SVG: a logarithmic (base 2) x axis, a y axis from 0 in percent, a legend. No fonts or scripts are
 * fetched. */
#ifndef KVD_BENCH_SVG_PLOT_H
#define KVD_BENCH_SVG_PLOT_H

#include <stddef.h>
#include <stdio.h>

struct plot_series {
    const char *name;
    const char *colour; /* of SVG */
    const double *y;    /* percent; n_x of them; borrowed for the call */
    int dashed;
};

struct plot {
    const char *title, *subtitle, *x_label, *y_label;
    const double *x; /* increasing, positive; a tick is written at each whole power of two */
    size_t n_x;
    const struct plot_series *series;
    size_t n_series;
};

/* -EIO if the stream has failed. Strings must not need escaping in XML. */
int plot_write_svg(const struct plot *p, FILE *f);

#endif
