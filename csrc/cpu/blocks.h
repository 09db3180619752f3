// SPDX-License-Identifier: MIT
// Sums of the scores in blocks of a weight, and the mask of the blocks that are kept.
#pragma once

#include "../math/structures.h"
#include "parallel.h"
#include "source.h"

namespace lap::cpu {

// sums[unit, column of blocks] += the scores, or their squares, of the source's rows, in the order
// of math/sums.h within a row of a block, and of the rows. What is not eligible counts 0. Returns
// whether all weights are finite (scores: numbers); if not, the sums are of no use.
bool block_sums(
    const Source& source, const Blocks& blocks, bool squared, const Pool& pool, double* sums);

// mask[row, column, position] = kept[unit, column of blocks] and eligible (null: all)
void block_mask(const uint8_t* kept,
                const Layout& layout,
                const Blocks& blocks,
                const uint8_t* eligible,
                const Pool& pool,
                uint8_t* mask);

}  // namespace lap::cpu
