// The device's view of adapters and of a step's work; `rust/kernels/src/cuda/adapter_table.rs` mirrors it.
//
// Weights lie in the panels that `rust/adapters/src/layout.rs` describes, pairs along K:
//   A  [Σ rank, in_features]  panels of 16 ranks, the last may have 8: [in_features / 2][width][2]
//   B  [out_features, rank]   panels of 16 columns of the fused output: [rank / 2][16][2]
#pragma once

constexpr int PANEL_WIDTH = 16;
constexpr int MAX_MODULES = 3;

// One adapted module of a fused projection.
struct Module {
    const char* b;
    const float*
        columns;    // [num_panels][gain, shift][16], y = gain · (y + delta) + weight · shift; null: none
    unsigned rank;  // padded to 8; 0: no A and no B
    unsigned rank_offset;
    unsigned first_panel;  // of the fused output
    unsigned num_panels;
    float scale;
    unsigned pad;
};

// What an adapter has for one projection of one layer; nothing if num_modules is 0.
struct alignas(16) Group {
    const char* a;
    unsigned rank;
    unsigned num_modules;
    Module modules[MAX_MODULES];
    unsigned long long pad;
};

// Rows of one segment: at most 64.
struct alignas(16) WorkItem {
    int first_row;
    int num_rows;
    int slot;
    float weight;
};

static_assert(sizeof(Module) == 40, "mirrored by Rust");
static_assert(sizeof(Group) == 144, "mirrored by Rust");
static_assert(sizeof(WorkItem) == 16, "mirrored by Rust");
