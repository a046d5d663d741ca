#include "sample.h"

#include "kernels.h"
#include "team.h"

typedef struct draw_job {
    const ae_kernels *kernels;
    const ae_sample *args;
} draw_job;

static void draw_rows(void *arg, const ae_thread *thread) {
    const draw_job *job = arg;
    job->kernels->sample(job->args, thread);
}

int ae_sample_run(ae_team *team, const ae_kernels *kernels, const ae_sample *args) {
    draw_job job = {kernels, args};
    return ae_team_run(team, draw_rows, &job);
}
