// SPDX-License-Identifier: MIT
// The CUDA sources compiled for the emulator, as one unit.
#define LAP_EMULATED
#include "../../csrc/cuda/blocks.cu"
#include "../../csrc/cuda/norms.cu"
#include "../../csrc/cuda/patterns.cu"
#include "../../csrc/cuda/score.cu"
#include "../../csrc/cuda/scored.cu"
#include "../../csrc/cuda/select.cu"
#include "../../csrc/cuda/select_rows.cu"
#include "../../csrc/cuda/select_scores.cu"
#include "../../csrc/cuda/select_weights.cu"
#include "../../csrc/cuda/zero.cu"
