#include "bench/svg_plot.h"

#include <errno.h>
#include <math.h>

#define WIDTH  760.0
#define HEIGHT 460.0
#define LEFT   72.0
#define RIGHT  24.0
#define TOP    68.0
#define BOTTOM 64.0

struct frame {
    FILE *f;
    double x_min, x_max, y_max; /* x in powers of two */
    double y_step;
};

static double at_x(const struct frame *r, double x)
{
    double span = r->x_max > r->x_min ? r->x_max - r->x_min : 1;

    return LEFT + (log2(x) - r->x_min) / span * (WIDTH - LEFT - RIGHT);
}

static double at_y(const struct frame *r, double y)
{
    return HEIGHT - BOTTOM - y / r->y_max * (HEIGHT - TOP - BOTTOM);
}

/* Round steps, about six of them, and an end just above the highest value. */
static void scale_y(struct frame *r, const struct plot *p)
{
    static const double steps[] = {1, 2, 5, 10, 20, 25};
    double top = 1;

    for (size_t s = 0; s < p->n_series; s++)
        for (size_t i = 0; i < p->n_x; i++)
            top = fmax(top, p->series[s].y[i]);
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        r->y_step = steps[i];
        r->y_max = ceil(top / steps[i]) * steps[i];
        if (r->y_max / steps[i] <= 8)
            break;
    }
}

static void draw_axes(const struct frame *r, const struct plot *p)
{
    double bottom = HEIGHT - BOTTOM;

    for (double y = 0; y <= r->y_max + r->y_step / 2; y += r->y_step) {
        fprintf(r->f, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='%s'/>\n", LEFT, at_y(r, y), WIDTH - RIGHT,
                at_y(r, y), y == 0 ? "#333" : "#ddd");
        fprintf(r->f, "<text x='%.1f' y='%.1f' text-anchor='end'>%g</text>\n", LEFT - 8, at_y(r, y) + 4, y);
    }
    for (double e = ceil(r->x_min - 1e-9); e <= r->x_max + 1e-9; e += 1) {
        double x = at_x(r, exp2(e));

        fprintf(r->f, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='#333'/>\n", x, bottom, x, bottom + 5);
        if (e < 0)
            fprintf(r->f, "<text x='%.1f' y='%.1f' text-anchor='middle'>1/%g</text>\n", x, bottom + 20, exp2(-e));
        else
            fprintf(r->f, "<text x='%.1f' y='%.1f' text-anchor='middle'>%g</text>\n", x, bottom + 20, exp2(e));
    }
    fprintf(r->f, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='#333'/>\n", LEFT, TOP, LEFT, bottom);
    fprintf(r->f, "<text x='%.1f' y='%.1f' text-anchor='middle'>%s</text>\n", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18,
            p->x_label);
    fprintf(r->f, "<text transform='translate(22 %.1f) rotate(-90)' text-anchor='middle'>%s</text>\n",
            (TOP + bottom) / 2, p->y_label);
}

static void draw_series(const struct frame *r, const struct plot *p, const struct plot_series *s)
{
    fprintf(r->f, "<polyline fill='none' stroke='%s' stroke-width='2'%s points='", s->colour,
            s->dashed ? " stroke-dasharray='6 4'" : "");
    for (size_t i = 0; i < p->n_x; i++)
        fprintf(r->f, "%s%.1f,%.1f", i ? " " : "", at_x(r, p->x[i]), at_y(r, s->y[i]));
    fprintf(r->f, "'/>\n");
    for (size_t i = 0; i < p->n_x; i++)
        fprintf(r->f, "<circle cx='%.1f' cy='%.1f' r='2.8' fill='%s'/>\n", at_x(r, p->x[i]), at_y(r, s->y[i]),
                s->colour);
}

/* Lower right corner: curves of hit rate rise to the right, so that it is empty. */
static void draw_legend(const struct frame *r, const struct plot *p)
{
    double x = WIDTH - RIGHT - 210, y = HEIGHT - BOTTOM - 14 - 20 * (double)p->n_series;

    fprintf(r->f, "<rect x='%.1f' y='%.1f' width='200' height='%.1f' fill='white' stroke='#bbb'/>\n", x, y,
            20 * (double)p->n_series + 6);
    for (size_t i = 0; i < p->n_series; i++) {
        double line = y + 13 + 20 * (double)i;

        fprintf(r->f, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='%s' stroke-width='2'%s/>\n", x + 10, line,
                x + 40, line, p->series[i].colour, p->series[i].dashed ? " stroke-dasharray='6 4'" : "");
        fprintf(r->f, "<text x='%.1f' y='%.1f'>%s</text>\n", x + 50, line + 4, p->series[i].name);
    }
}

int plot_write_svg(const struct plot *p, FILE *f)
{
    struct frame r = {.f = f, .x_min = log2(p->x[0]), .x_max = log2(p->x[p->n_x - 1])};

    scale_y(&r, p);
    fprintf(
        f,
        "<svg xmlns='http://www.w3.org/2000/svg' width='%g' height='%g' viewBox='0 0 %g %g' font-family='sans-serif' "
        "font-size='12'>\n<rect width='100%%' height='100%%' fill='white'/>\n",
        WIDTH, HEIGHT, WIDTH, HEIGHT);
    fprintf(f, "<text x='%.1f' y='28' font-size='16' font-weight='bold'>%s</text>\n", LEFT, p->title);
    fprintf(f, "<text x='%.1f' y='48' fill='#555'>%s</text>\n", LEFT, p->subtitle);
    draw_axes(&r, p);
    for (size_t i = 0; i < p->n_series; i++)
        draw_series(&r, p, &p->series[i]);
    draw_legend(&r, p);
    fprintf(f, "</svg>\n");
    return ferror(f) ? -EIO : 0;
}
