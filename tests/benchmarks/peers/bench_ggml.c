// The experts of a layer of 20b by ggml on a CPU, for bench_ggml.py: gate_up, SwiGLU and down in MXFP4, of random values.
// Arguments: tokens, threads, seconds. Prints one JSON object: the round that read the most bytes a second.
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "ggml-cpu.h"
#include "ggml.h"

enum { HIDDEN = 2880, INNER = 2880, EXPERTS = 32, CHOSEN = 4 };

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static struct ggml_tensor *packed(struct ggml_context *context, int columns, int rows) {
    struct ggml_tensor *weight = ggml_new_tensor_3d(context, GGML_TYPE_MXFP4, columns, rows, EXPERTS);
    unsigned char *octets = weight->data;  // blocks of a scale and 16 bytes of codes
    for (size_t i = 0; i < ggml_nbytes(weight); i++) octets[i] = i % 17 ? rand() : 117 + rand() % 6;
    return weight;
}

// Experts of each token: at one token those that follow on the round before, else random ones. Returns how many differ.
static int choose(int *ids, int tokens, long round) {
    bool used[EXPERTS] = {false};
    int different = 0;
    for (int at = 0; at < tokens * CHOSEN; at++) {
        bool again = true;
        while (again) {
            ids[at] = tokens == 1 ? (round * CHOSEN + at) % EXPERTS : rand() % EXPERTS;
            again = false;
            for (int before = at / CHOSEN * CHOSEN; before < at; before++) again |= ids[before] == ids[at];
        }
        different += !used[ids[at]];
        used[ids[at]] = true;
    }
    return different;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int tokens = atoi(arguments[1]), threads = atoi(arguments[2]);
    double seconds = atof(arguments[3]);
    struct ggml_init_params memory = {.mem_size = (size_t)1 << 30};
    struct ggml_context *c = ggml_init(memory);
    struct ggml_tensor *gate_up = packed(c, HIDDEN, 2 * INNER), *down = packed(c, INNER, HIDDEN);
    struct ggml_tensor *x = ggml_new_tensor_3d(c, GGML_TYPE_F32, HIDDEN, 1, tokens);
    struct ggml_tensor *ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, CHOSEN, tokens);
    for (int i = 0; i < HIDDEN * tokens; i++) ((float *)x->data)[i] = rand() / (float)RAND_MAX - 0.5f;
    struct ggml_tensor *both = ggml_mul_mat_id(c, gate_up, x, ids), *half[2];
    for (int i = 0; i < 2; i++) {
        size_t offset = (size_t)i * INNER * sizeof(float);
        half[i] = ggml_cont(c, ggml_view_3d(c, both, INNER, CHOSEN, tokens, both->nb[1], both->nb[2], offset));
    }
    struct ggml_tensor *inner = ggml_swiglu_oai(c, half[0], half[1], 1.702f, 7.0f);
    struct ggml_cgraph *graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, ggml_mul_mat_id(c, down, inner, ids));
    struct ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
    struct ggml_cplan plan = ggml_graph_plan(graph, threads, ggml_threadpool_new(&pool));
    plan.work_data = malloc(plan.work_size);
    double expert_bytes = (double)(ggml_nbytes(gate_up) + ggml_nbytes(down)) / EXPERTS, best_s = 0, best = 0;
    long rounds = 0;
    for (double end_s = now_s() + seconds; now_s() < end_s; rounds++) {
        int different = choose(ids->data, tokens, rounds);
        double began_s = now_s();
        ggml_graph_compute(graph, &plan);
        double took_s = now_s() - began_s, rate = different * expert_bytes / took_s;
        if (rate > best) best = rate, best_s = took_s;
    }
    printf("{\"way\": \"ggml\", \"tokens\": %d, \"threads\": %d, \"rounds\": %ld, \"ms\": %.2f, \"gb_s\": %.2f}\n", tokens,
           threads, rounds, best_s * 1e3, best / 1e9);
    return 0;
}
