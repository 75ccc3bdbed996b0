// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// The search of many rows on Hopper, as a pipeline through one persistent block's shared memory. Consumer warpgroups
// score 64 rows each against every tile of codes and keep the best; where only the last 64 are left, all score these,
// against a share of the tiles each. One warpgroup converts the next rows meanwhile. In the last one, a warp streams
// the tiles of codes, and three write codes and list the rows that the filter left open.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cuda/ptx>

#include <cuvq/arch/hopper.cuh>
#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/detail/arguments.hpp>
#include <cuvq/device/certificate.cuh>
#include <cuvq/device/image.cuh>
#include <cuvq/kernel/outputs.cuh>
#include <cuvq/kernel/prepare.cuh>
#include <cuvq/kernel/rows_sm90.cuh>
#include <cuvq/kernel/settle.cuh>
#include <cuvq/kernel/table_filter_sm90.cuh>
#include <cuvq/views.hpp>

namespace cuvq::kernel {

/// Shared memory of the kernel, by offsets.
template <class Tile>
struct sm90_shared {
    using layout = arch::wgmma_layout<Tile::steps>;
    static_assert(Tile::consumers >= 1 && Tile::stages >= 1 && Tile::row_buffers >= Tile::consumers,
                  "cuvq: every consumer of an sm90_tile needs a buffer of rows, lest they wait for each other");
    static constexpr int result_buffers = 2 * finishing_warps;  // so that each of them has its own
    static_assert(Tile::consumers <= finishing_warps, "cuvq: an sm90_tile has at most three consumers");
    // A stage holds a tile of codes, or of long rows one of two parts of it, which the tensor cores read in turn.
    static constexpr int parts = Tile::steps > 9 ? 2 : 1, part_steps = parts == 1 ? Tile::steps : Tile::steps / 8 * 4;
    static constexpr int code_bytes = layout::bytes(image_tile), row_bytes = layout::bytes(row_results::rows);
    static_assert(Tile::stages >= parts, "cuvq: an sm90_tile has stages for a whole tile of codes");
    static_assert(Tile::steps > 1 || Tile::row_buffers > 1,
                  "cuvq: rows of an sm90_tile of one step are converted two by two");
    static constexpr int part_bytes = parts == 1 ? code_bytes : layout::step_offset(image_tile, part_steps);
    static constexpr int last_bytes = code_bytes - (parts - 1) * part_bytes;
    static constexpr int stage_bytes = part_bytes > last_bytes ? part_bytes : last_bytes;
    static constexpr int rows = Tile::stages * stage_bytes;
    static constexpr int errors = rows + Tile::row_buffers * row_bytes;
    static constexpr int results = errors + Tile::row_buffers * row_results::rows * 4;
    static constexpr int centre = results + result_buffers * static_cast<int>(sizeof(row_results));
    static constexpr int bounds = centre + 64 * Tile::steps;
    static constexpr int barriers = bounds + static_cast<int>(sizeof(device::score_bounds));
    static constexpr int handed = barriers + 8 * 2 * (Tile::stages + Tile::row_buffers + result_buffers);
    // Whether consumers may share a turn. With no more tiles in flight than they score at once they would wait; of more
    // than one step, registers run short, and all other turns take longer.
    static constexpr bool shares = Tile::steps == 1 && Tile::consumers > 1 && Tile::stages > Tile::consumers;
    static constexpr int bytes = handed + (shares ? (Tile::consumers - 1) * 128 * most_filter_bytes : 0);
    static constexpr int allocated = bytes + 1024;  // the base is aligned by hand
    static constexpr int threads = 128 * (Tile::consumers + 2);
};

/// Lets consumers start the products of their tiles one after the other, from the first on: of long rows, those of
/// several that start at once take longer. Nothing for short ones.
template <class Tile>
struct product_order {
    static constexpr bool keeps = Tile::steps > 9 && Tile::consumers > 1;
    int consumer;

    __device__ void open() const {
        if (keeps && consumer == Tile::consumers - 1) pass_on();
    }
    __device__ void wait() const {
        if (keeps) asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
    }
    __device__ void pass_on() const {
        if (keeps) asm volatile("bar.arrive %0, 256;" ::"r"(1 + (consumer + 1) % Tile::consumers) : "memory");
    }
    __device__ void close() const {
        if (keeps && consumer == 0) wait();
    }
};

/// A ring of buffers as one side of it walks: which buffer, and the parity its barrier is waited for with.
template <int Buffers>
struct ring {
    int at = 0;
    std::uint32_t parity;

    __device__ explicit ring(std::uint32_t first_parity) : parity(first_parity) {}
    __device__ void next() {
        if (++at == Buffers) {
            at = 0;
            parity ^= 1;
        }
    }
};

#if CUVQ_HAS_WGMMA

__device__ inline void wait(std::uint64_t* barrier, std::uint32_t parity) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
    }
    __syncwarp();
}

/// One warp's arrival, once all its lanes are done.
__device__ inline void arrive(std::uint64_t* barrier) {
    namespace ptx = cuda::ptx;
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier);
}

/// The arrival of each lane. Once per 64 rows that costs nothing, and checkers of races can follow it.
__device__ inline void arrive_each(std::uint64_t* barrier) {
    namespace ptx = cuda::ptx;
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier);
}

/// The barriers of the pipeline: `..._full` when there is something to read, `..._empty` when it has been read.
template <class Tile>
struct sm90_barriers {
    std::uint64_t *codes_full, *codes_empty;      // [stages]
    std::uint64_t *rows_full, *rows_empty;        // [row_buffers]
    std::uint64_t *results_full, *results_empty;  // [result_buffers]

    __device__ explicit sm90_barriers(std::uint64_t* base) {
        codes_full = base;
        codes_empty = codes_full + Tile::stages;
        rows_full = codes_empty + Tile::stages;
        rows_empty = rows_full + Tile::row_buffers;
        results_full = rows_empty + Tile::row_buffers;
        results_empty = results_full + sm90_shared<Tile>::result_buffers;
    }
    __device__ void init() const {
        namespace ptx = cuda::ptx;
        for (int i = 0; i < Tile::stages; ++i) {
            ptx::mbarrier_init(codes_full + i, 1);
            ptx::mbarrier_init(codes_empty + i, 4 * Tile::consumers);
        }
        for (int i = 0; i < Tile::row_buffers; ++i) {
            ptx::mbarrier_init(rows_full + i, Tile::steps == 1 ? 64 : 128);
            ptx::mbarrier_init(rows_empty + i, 128);
        }
        for (int i = 0; i < sm90_shared<Tile>::result_buffers; ++i) {
            ptx::mbarrier_init(results_full + i, 128);
            ptx::mbarrier_init(results_empty + i, 32);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
};

/// Has rows of x brought into the L2 cache: of `count` from `first` on, thread `thread` of `threads`' share.
template <class X>
__device__ void fetch_rows(const matrix_ref<const X>& x, std::int64_t first, int count, int thread, int threads) {
    constexpr int line = 128;
    const int lines = (static_cast<int>(x.columns * sizeof(X)) - 1) / line + 1;
    for (int i = thread; i < count * lines; i += threads) {
        const std::int64_t row = first + i / lines;
        if (row < x.rows) arch::fetch(reinterpret_cast<const char*>(x.row(row)) + i % lines * line);
    }
}

/// The converting warp `part` of four, of operands of a single step: 32 rows of every other 64, a lane each.
template <class Tile, class X>
__device__ void convert_short_rows(const matrix_ref<const X>& x, const float* scaled_centre, float scale,
                                   const device::score_bounds& bounds, char* operands, float* errors,
                                   const sm90_barriers<Tile>& barriers, const row_span& span, int part) {
    const int columns = static_cast<int>(x.columns), r = part % 2 * 32 + static_cast<int>(threadIdx.x) % 32;
    const device::operand_columns place(columns, arch::slab_layout{1});
    const bool vectors = loads_vectors(x);
    short_row next;
    const auto load = [&](int turn) {
        const std::int64_t row = span.first(turn) + r;
        next.load(x.row(row < x.rows ? row : x.rows - 1), columns, vectors);
    };
    load(part / 2);
    for (int turn = part / 2; span.has(turn); turn += 2) {
        const short_row row = next;
        load(turn + 2);
        const unsigned at = static_cast<unsigned>(turn) % Tile::row_buffers;
        wait(barriers.rows_empty + at, (static_cast<unsigned>(turn) / Tile::row_buffers & 1) ^ 1);
        const row_measure measure = row.put(operands + at * sm90_shared<Tile>::row_bytes, r, place, scale,
                                            [&](int d) { return scaled_centre[d]; });
        errors[at * row_results::rows + r] = measure.error(bounds, 1);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        if (turn > 0) {  // turns are done in their order, which is what parities tell apart
            const unsigned before = static_cast<unsigned>(turn) - 1;
            wait(barriers.rows_full + before % Tile::row_buffers, before / Tile::row_buffers & 1);
        }
        arrive_each(barriers.rows_full + at);
    }
}

/// The same for longer rows: 16 of every 64, as `row_split` says.
template <class Tile, class X>
__device__ void convert_rows(const matrix_ref<const X>& x, const float* scaled_centre, float scale,
                             const device::score_bounds& bounds, char* operands, float* errors,
                             const sm90_barriers<Tile>& barriers, const row_span& span, int part) {
    constexpr int steps = Tile::steps;
    using split = row_split<steps>;
    const int columns = static_cast<int>(x.columns);
    const int row0 = part * 16 + static_cast<int>(threadIdx.x) % 32 / split::lanes;
    // Rows of nothing but whole parts, and one more for the factors, are loaded ahead.
    constexpr int data_columns = 16 * (steps - 1), data_parts = data_columns / 4 / split::lanes;
    const bool vectors = loads_vectors(x);
    float4 v[data_parts];  // of the row that comes next
    const auto load = [&](std::int64_t row, int s) {
        v[s] = device::load4(x.row(row < x.rows ? row : x.rows - 1) + split::column(s));
    };
    const auto centre = [&](int d) { return *reinterpret_cast<const float4*>(scaled_centre + d); };
    const auto row_at = [&](std::int64_t r) { return x.row(r < x.rows ? r : 0); };
    // Walks the turns; convert(image, row, next row) gives the row's t.
    const auto turns = [&](auto convert) {
        ring<Tile::row_buffers> buffer(1);
        for (int turn = 0; span.has(turn); ++turn, buffer.next()) {
            const std::int64_t first = span.first(turn) + row0;
            wait(barriers.rows_empty + buffer.at, buffer.parity);
            float square = 0, residual = 0, own_factor = 1;  // of the row whose error bound this lane works out
#pragma unroll 1
            for (int i = 0; i < 16; i += split::rows) {
                row_image<steps> image{operands + buffer.at * sm90_shared<Tile>::row_bytes, row0 + i};
                const std::int64_t then = i + split::rows < 16 ? first + i + split::rows : span.first(turn + 1) + row0;
                const float factor = convert(image, first + i, then);
                if (split::lane() * split::rows == i) {
                    square = image.square;
                    residual = image.residual;
                    own_factor = factor;
                }
            }
            if (const int own = split::lane() * split::rows; own < 16)
                errors[buffer.at * row_results::rows + row0 + own] =
                    row_measure::of(square, residual, own_factor).error(bounds, steps);
            cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
            arrive_each(barriers.rows_full + buffer.at);
        }
    };
    if (columns == data_columns && vectors) {
#pragma unroll
        for (int s = 0; s < data_parts; ++s) load(span.first(0) + row0, s);
        turns([&](row_image<steps>& image, std::int64_t row, std::int64_t then) {
            float4 c = centre(split::column(0));
#pragma unroll
            for (int s = 0; s < data_parts; ++s) {
                const float4 u = image.centred(v[s], scale, c);
                if (s + 1 < data_parts) c = centre(split::column(s + 1));  // before the stores, which it may not pass
                image.put(u, s);
                load(then, s);
            }
            image.put_factor(1.0f, data_columns, data_parts);
            if (image.fits()) return 1.0f;
            return image.template put_all<1>(row_at(row), row < x.rows, columns, vectors, centre, scale, true);
        });
    } else {
        turns([&](row_image<steps>& image, std::int64_t row, std::int64_t) {
            return image.template put_all<split::parts>(row_at(row), row < x.rows, columns, vectors, centre, scale,
                                                        false);
        });
    }
}

/// Finishing warp `part`: codes, and lists of the rows that the filter left open.
template <class Tile, class X, class C>
__device__ void finish_rows(const detail::quantize_args<X, C>& a, const search_tally& tally, const open_rows& open,
                            const row_results* results, const sm90_barriers<Tile>& barriers, const row_span& span,
                            int part) {
    constexpr int buffers = sm90_shared<Tile>::result_buffers;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const rows_seen seen{span, part};
    const int tiles = static_cast<int>(device::image_ref::tiles(a.codebook.rows));
    int front = 0, back = seen.count();  // of its list, what is free
    for (int turn = part, number = lane; span.has(turn); turn += finishing_warps) {
        const unsigned put = static_cast<unsigned>(turn) % buffers;
        wait(barriers.results_full + put, static_cast<unsigned>(turn) / buffers & 1);
        const row_results& result = results[put];
        std::uint32_t* const digits = tally.digits.of(span.first(turn));
#pragma unroll 1
        for (int start = 0; start < row_results::rows; start += 32, number += 32) {
            const std::int64_t row = span.first(turn) + start + lane;
            const int code = row < a.x.rows ? result.code[start + lane] : 0;
            const unsigned left_open = __ballot_sync(0xFFFFFFFFu, code < 0);
            if (left_open != 0) {
                const int count = -1 - code;  // of an open row
                const bool wide = code < 0 && count > row_results::wide;
                const open_words words = result.word[start + lane];
                const unsigned all_wide = __ballot_sync(0xFFFFFFFFu, wide), below = (1u << lane) - 1;
                back -= __popc(all_wide);
                if (code < 0) {
                    const std::int64_t place = seen.row(wide ? back + __popc(all_wide & below)
                                                             : front + __popc(left_open & ~all_wide & below));
                    open.rows[place] = number;
                    open.words[place] = words.cut(count % row_results::wide, tiles);
                }
                front += __popc(left_open & ~all_wide);
            }
            if (code >= 0 && row < a.x.rows) write_code(a, tally, row, code, digits);
        }
        arrive_each(barriers.results_empty + put);
    }
    if (lane == 0) open.counts[finishing_warps * blockIdx.x + part] = {front, seen.count() - back};
}

/// How the turns of a block are dealt out to its consumers: `width` of them take one each in every round, as evenly as
/// can be. Of a large codebook, a single turn more than whole rounds is shared by all of them.
template <class Tile>
struct turn_rounds {
    bool last_shared;
    int rounds, width;  // without the shared turn

    __device__ turn_rounds(int turns, int tiles)
        : last_shared(sm90_shared<Tile>::shares && has_many(tiles) && turns % Tile::consumers == 1),
          rounds((turns - 1) / Tile::consumers + !last_shared),
          width(last_shared ? Tile::consumers : (turns - 1) / rounds + 1) {}
};

/// The warp that streams the tiles of codes, in each round all of them; one lane.
template <class Tile>
__device__ void stream_codes(const codebook_image& image, int tiles, char* codes, const sm90_barriers<Tile>& barriers,
                             const row_span& span) {
    namespace ptx = cuda::ptx;
    using shared = sm90_shared<Tile>;
    ring<Tile::stages> stage(1);
    const turn_rounds<Tile> deal(span.turns(), tiles);
    for (int round = 0; round < deal.rounds + deal.last_shared; ++round) {
        for (int i = 0; i < tiles * shared::parts; ++i, stage.next()) {
            const int tile = i / shared::parts, part = i % shared::parts;
            const int bytes = part + 1 < shared::parts ? shared::part_bytes : shared::last_bytes;
            std::uint64_t* full = barriers.codes_full + stage.at;
            while (!ptx::mbarrier_try_wait_parity(barriers.codes_empty + stage.at, stage.parity)) {
            }
            ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full, bytes);
            ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, codes + stage.at * shared::stage_bytes,
                               image.rows + std::int64_t{tile} * shared::code_bytes + part * shared::part_bytes, bytes,
                               full);
        }
    }
}

/// A consumer leaves `count` stages to the others, but keeps step with them.
template <class Tile>
__device__ void pass_stages(int count, const sm90_barriers<Tile>& barriers, ring<Tile::stages>& stage,
                            const product_order<Tile>& order) {
    for (int i = 0; i < count; ++i, stage.next()) {
        wait(barriers.codes_full + stage.at, stage.parity);
        if (i % sm90_shared<Tile>::parts == 0) {
            order.wait();
            order.pass_on();
        }
        arrive(barriers.codes_empty + stage.at);
    }
}

/// One warpgroup's 64 rows against the tiles of codes from `first` on, every `Apart`-th, whose scores go through
/// `filter`. `row_operand`: the rows'; `code_operands`: of the stages.
template <class Tile, int Apart, class Filter>
__device__ void score_tiles(Filter& filter, std::uint32_t row_operand, std::uint32_t code_operands, int first,
                            int tiles, int mask, const sm90_barriers<Tile>& barriers, ring<Tile::stages>& stage,
                            const product_order<Tile>& order) {
    using shared = sm90_shared<Tile>;
    pass_stages<Tile>(first, barriers, stage, order);
    for (int tile = first; tile < tiles; tile += Apart) {
        float score[64];  // (16 pairs of codes, 2 rows, 2)
        const auto operand = [&] { return arch::uniform(code_operands + stage.at * (shared::stage_bytes >> 4)); };
        wait(barriers.codes_full + stage.at, stage.parity);
        order.wait();
        arch::wgmma_fence();
        arch::wgmma_scores<Tile::steps, 0, shared::part_steps>(score, row_operand, operand());
        arch::wgmma_commit();
        if constexpr (shared::parts == 2) {
            const int before = stage.at;
            stage.next();
            wait(barriers.codes_full + stage.at, stage.parity);
            arch::wgmma_fence();
            arch::wgmma_scores<Tile::steps, shared::part_steps>(score, row_operand, operand());
            arch::wgmma_commit();
            arch::wgmma_wait_but<1>();
            arrive(barriers.codes_empty + before);
        }
        order.pass_on();
        arch::wgmma_wait();
        arrive(barriers.codes_empty + stage.at);
        filter.take(score, tile, mask);
        stage.next();
        if (Apart > 1) pass_stages<Tile>(min(Apart, tiles - tile) - 1, barriers, stage, order);
    }
}

/// Brings together in the first consumer what all of them saw of the turn that they share, by way of `handed`
/// (consumers - 1, 128).
template <class Tile, class Filter>
__device__ void gather_filters(Filter& filter, Filter* handed, int consumer) {
    static_assert(!product_order<Tile>::keeps, "its barriers are the same ones");
    const int thread = static_cast<int>(threadIdx.x) % 128;
    if (consumer > 0) handed[(consumer - 1) * 128 + thread] = filter;
    __syncwarp();
    asm volatile("bar.sync 1, %0;" ::"n"(128 * Tile::consumers) : "memory");
    if (consumer > 0) return;
#pragma unroll 1
    for (int other = 0; other < Tile::consumers - 1; ++other) filter.merge(handed[other * 128 + thread]);
}

/// Consumer warpgroup `consumer`: in each round its turn of 64 rows, if it has one, against all tiles of codes; of a
/// shared turn, against its share of them.
template <class Tile>
__device__ void consume(char* codes, char* rows, const float* errors, row_results* results, int tiles, bool exact,
                        int mask, const sm90_barriers<Tile>& barriers, const row_span& span, int consumer) {
    using shared = sm90_shared<Tile>;
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t row_operands = arch::kept(arch::operand(rows));
    const std::uint32_t code_operands = arch::kept(arch::operand(codes));
    const int row0 = warp * 16 + lane / 4;
    ring<Tile::stages> stage(0);
    const product_order<Tile> order{consumer};
    order.open();
    const turn_rounds<Tile> deal(span.turns(), tiles);
    for (int round = 0; round < deal.rounds + deal.last_shared; ++round) {
        const bool together = shared::shares && round == deal.rounds;
        const unsigned turn = together ? span.turns() - 1 : round * deal.width + consumer;
        const unsigned at = turn % Tile::row_buffers, put = turn % shared::result_buffers;
        const std::uint32_t row_operand = arch::uniform(row_operands + at * (shared::row_bytes >> 4));
        if (!together && (consumer >= deal.width || !span.has(static_cast<int>(turn)))) {  // the others have rows
            pass_stages<Tile>(tiles * shared::parts, barriers, stage, order);
            continue;
        }
        wait(barriers.rows_full + at, turn / Tile::row_buffers & 1);
        const auto filter_by = [&](auto filter) {
            static_assert(sizeof filter <= most_filter_bytes);
            const auto score = [&](auto apart, int first) {
                score_tiles<Tile, decltype(apart)::value>(filter, row_operand, code_operands, first, tiles, mask,
                                                          barriers, stage, order);
            };
            if constexpr (shared::shares && decltype(filter)::many) {
                if (together) {
                    score(std::integral_constant<int, Tile::consumers>(), consumer);
                    gather_filters<Tile>(filter, reinterpret_cast<decltype(filter)*>(codes + shared::handed), consumer);
                    if (consumer > 0) return;
                }
            }
            if (!together) score(std::integral_constant<int, 1>(), 0);
            arrive_each(barriers.rows_empty + at);
            wait(barriers.results_empty + put, (turn / shared::result_buffers & 1) ^ 1);
            filter.conclude(tiles, results[put], row0);
            arrive_each(barriers.results_full + put);
        };
        const float error0 = errors[at * row_results::rows + row0], error1 = errors[at * row_results::rows + row0 + 8];
        const bool many = has_many(tiles);  // as it is where a turn is shared
        if (exact && many)
            filter_by(exact_filter<true>(error0, error1));
        else if (exact)
            filter_by(exact_filter<false>(error0, error1));
        else if (many)
            filter_by(fast_filter<true>(error0, error1));
        else
            filter_by(fast_filter<false>(error0, error1));
    }
    order.close();
}

#endif  // CUVQ_HAS_WGMMA

/// Codes of all rows of x but those in `open`. `mask` is `group_tag_mask`, or if not `exact`, `tag_mask` (a parameter,
/// so that clearing and tagging are one instruction).
template <class Tile, class X, class C>
__global__ __launch_bounds__(CUVQ_HAS_WGMMA ? sm90_shared<Tile>::threads : 32,
                             1) void quantize_sm90(const __grid_constant__ detail::quantize_args<X, C> a,
                                                   const __grid_constant__ codebook_image image,
                                                   const __grid_constant__ search_tally tally,
                                                   const __grid_constant__ open_rows open, int most_turns, bool exact,
                                                   int mask) {
#if CUVQ_HAS_WGMMA
    using shared = sm90_shared<Tile>;
    extern __shared__ __align__(128) char dynamic_shared[];
    char* base = dynamic_shared + ((1024 - (arch::shared_address(dynamic_shared) & 1023)) & 1023);
    char* codes = base;                                                      // (stages, 128 codes, steps * 16)
    char* rows = base + shared::rows;                                        // (row_buffers, 64 rows, steps * 16)
    auto* errors = reinterpret_cast<float*>(base + shared::errors);          // (row_buffers, 64)
    auto* results = reinterpret_cast<row_results*>(base + shared::results);  // (result_buffers)
    auto* centre = reinterpret_cast<float*>(base + shared::centre);
    auto* bounds = reinterpret_cast<int*>(base + shared::bounds);
    const sm90_barriers<Tile> barriers(arch::kept(reinterpret_cast<std::uint64_t*>(base + shared::barriers)));

    const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) % 128 / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int tiles = static_cast<int>(device::image_ref::tiles(a.codebook.rows));
    const row_span span{a.x.rows, most_turns, static_cast<int>(blockIdx.x)};
    if (threadIdx.x == 0) barriers.init();
    if (threadIdx.x < 4) bounds[threadIdx.x] = 0;
    arch::let_successor_start();
    // The rows that the consumers wait for at first, in that order.
    for (int turn = 0; turn < Tile::consumers; ++turn)
        fetch_rows(a.x, span.first(turn), row_results::rows, static_cast<int>(threadIdx.x), shared::threads);
    arch::wait_for_predecessor();
    __syncthreads();
    load_centre(image, static_cast<int>(a.x.columns), 16 * Tile::steps, centre);
    load_bounds(image, tiles, bounds, static_cast<int>(threadIdx.x));
    if (blockIdx.x == 0 && open.shared)
        for (int i = threadIdx.x; i < most_shared_rows; i += blockDim.x) open.shared[i].done = 0;
    if (tally.digits.histogram) {  // of the block's own rows: nobody else adds to these before the search is done
        const std::uint32_t from = tally.digits.chunks.number(span.first(0));
        const std::uint32_t to = tally.digits.chunks.number(span.first(span.turns() - 1)) + 1;
        for (std::uint32_t i = from * tally.digits.bins + threadIdx.x; i < to * tally.digits.bins; i += blockDim.x)
            tally.digits.histogram[i] = 0;
    }
    __syncthreads();

    if (warpgroup < Tile::consumers) {
        if constexpr (Tile::consumers == 3) arch::more_registers<120>();  // of 480: 3 x 120 + 80 + 40
        consume<Tile>(codes, rows, errors, results, tiles, exact, mask, barriers, span, warpgroup);
    } else {
        if (warpgroup == Tile::consumers) {
            if constexpr (Tile::consumers == 3) arch::fewer_registers<80>();
            const device::score_bounds limits = as_bounds(bounds);
            const float scale = *image.scale;
            if constexpr (Tile::steps == 1)
                convert_short_rows<Tile>(a.x, centre, scale, limits, rows, errors, barriers, span, warp);
            else
                convert_rows<Tile>(a.x, centre, scale, limits, rows, errors, barriers, span, warp);
        } else {
            if constexpr (Tile::consumers == 3) arch::fewer_registers<40>();
            if (warp > 0)
                finish_rows<Tile>(a, tally, open, results, barriers, span, warp - 1);
            else if (lane == 0)
                stream_codes<Tile>(image, tiles, codes, barriers, span);
        }
    }
#endif  // CUVQ_HAS_WGMMA
}

}  // namespace cuvq::kernel
