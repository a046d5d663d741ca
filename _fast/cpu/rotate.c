#include "rotate.h"

#include <math.h>

float ae_cos[AE_MOST_FACTOR + 1][AE_MOST_FACTOR + 1], ae_sin[AE_MOST_FACTOR + 1][AE_MOST_FACTOR + 1];

__attribute__((constructor)) static void fill(void) {
    for (int f = 3; f <= AE_MOST_FACTOR; f += 2)
        for (int i = 0; i < f; i++) {
            const double angle = 2 * 3.14159265358979323846 * i / f;
            ae_cos[f][i] = (float)cos(angle);
            ae_sin[f][i] = (float)sin(angle);
        }
}
