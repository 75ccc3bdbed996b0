// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// What a warpgroup makes of the scores of its 64 rows, tile after tile, where there are so many that each instruction
// counts: the codes that could win, found with one instruction for each score. A thread's 32 scores of a row and tile
// make a table: it keeps the largest of each group, a row of the table, apart, and the largest of each column over all
// tiles. A code that could win stands in a group and a column that both could; nearly always that is one of each.
#pragma once

#include <climits>
#include <cstdint>

#include <cuda_runtime.h>

#include <cuvq/arch/wgmma_sm90.cuh>
#include <cuvq/kernel/filter_sm90.cuh>
#include <cuvq/kernel/prepare.cuh>

namespace cuvq::kernel {

/// A thread's scores of a row and tile: `groups` groups of `columns` places next to each other. Groups are numbered
/// over the codebook.
struct score_table {
    static constexpr int groups = 4, columns = 8;
    static_assert(groups * columns == image_tile / 4, "all that a thread scores");

    CUVQ_HOST_DEVICE static constexpr int number(int tile, int group, int q) { return (tile * groups + group) * 4 + q; }
    CUVQ_HOST_DEVICE static constexpr int code(int number, int column) {
        return scored_code(number / (4 * groups), number / 4 % groups * columns + column, number % 4);
    }
};

/// What an open row is settled from, in 16 bytes: words of 16 bits, or of a codebook of many tiles, of 32. A word is a
/// code, or one of those below.
struct alignas(16) open_words {
    static constexpr int most_short_tiles = 255;
    static constexpr int none = -1;          // behind the last
    static constexpr int everything = -2;    // the whole codebook
    static constexpr int column = -16;       // column + q: all codes that thread q of 4 scored
    static constexpr int first_group = -17;  // first_group - i: of group i the codes that the last set of columns names
    static constexpr int column_sets = 1 << score_table::columns;

    int bits[4];

    /// Whether a word names codes without listing them.
    __device__ static bool is_whole(int word) { return word == everything || (word >= column && word < column + 4); }
    __device__ static bool are_short(int tiles) { return tiles <= most_short_tiles; }
    __device__ static int most(int tiles) { return are_short(tiles) ? 8 : 4; }
    /// The word for a set of columns, a bit each: none is smaller than these.
    __device__ static int of_columns(unsigned set, int tiles) {
        return (are_short(tiles) ? SHRT_MIN : INT_MIN) + static_cast<int>(set);
    }
    __device__ static bool is_set(int word, int tiles) { return word < of_columns(column_sets, tiles); }

    __device__ void put(int i, int word, int tiles) {
        if (are_short(tiles))
            reinterpret_cast<std::int16_t*>(bits)[i] = static_cast<std::int16_t>(word);
        else
            bits[i] = word;
    }
    __device__ int word(int i, int tiles) const {
        return are_short(tiles) ? static_cast<std::int16_t>(bits[i / 2] >> i % 2 * 16) : bits[i];
    }
    /// Of the codes that are listed, by themselves or by group and columns, the i-th, maybe one beyond the last of the
    /// codebook; or `none`. For lanes that want one each: one that wants them all had better have a `word_reader`,
    /// eight lanes of one row a `shared_reader`.
    __device__ int listed(int i, int tiles) const {
        unsigned columns = 0;
        for (int at = 0; at < most(tiles); ++at) {
            const int w = word(at, tiles);
            if (w >= 0) {
                if (i-- == 0) return w;
            } else if (is_set(w, tiles)) {
                columns = static_cast<unsigned>(w) & (column_sets - 1);
            } else if (w <= first_group) {
                const int codes = __popc(columns);
                if (i < codes) {
                    for (; i > 0; --i) columns &= columns - 1;
                    return score_table::code(first_group - w, __ffs(static_cast<int>(columns)) - 1);
                }
                i -= codes;
            }
        }
        return none;
    }
    /// The first `count` words alone.
    __device__ open_words cut(int count, int tiles) const {
        open_words cut;
        const int each = are_short(tiles) ? 2 : 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int left = count - i * each;
            cut.bits[i] = left <= 0 ? none : left < each ? bits[i] | static_cast<int>(0xFFFF0000u) : bits[i];
        }
        return cut;
    }
};
static_assert(SHRT_MIN + open_words::column_sets <
                  open_words::first_group - score_table::number(open_words::most_short_tiles, 0, 0) &&
              image_tile * open_words::most_short_tiles <= SHRT_MAX);

/// Reads the codes that words list, one after the other.
class word_reader {
public:
    __device__ word_reader(const open_words& words, int tiles) : words_(words), tiles_(tiles) {}

    /// The next one, as `open_words::listed`.
    __device__ int next() {
        for (;;) {
            if (left_ != 0) {
                const int column = __ffs(static_cast<int>(left_)) - 1;
                left_ &= left_ - 1;
                return score_table::code(group_, column);
            }
            if (at_ == open_words::most(tiles_)) return open_words::none;
            const int word = words_.word(at_++, tiles_);
            if (word >= 0) return word;
            if (open_words::is_set(word, tiles_)) {
                columns_ = static_cast<unsigned>(word) & (open_words::column_sets - 1);
            } else if (word <= open_words::first_group) {
                group_ = open_words::first_group - word;
                left_ = columns_;
            }
        }
    }

private:
    const open_words& words_;
    int tiles_, at_ = 0, group_ = 0;
    unsigned columns_ = 0, left_ = 0;
};

/// The same by eight lanes together, `lanes` of a warp, each with a word of its own. A group comes after a set.
class shared_reader {
public:
    __device__ shared_reader(int word, int tiles, unsigned lanes) : lanes_(lanes), word_(word) {
        const int own = static_cast<int>(threadIdx.x) % width;
        const bool is_set = open_words::is_set(word, tiles);
        const unsigned sets = __ballot_sync(lanes, is_set) >> static_cast<int>(threadIdx.x) % 32 / width * width;
        const unsigned before = sets & ((1u << own) - 1);
        columns_ = static_cast<unsigned>(__shfl_sync(lanes, word, 31 - __clz(static_cast<int>(before)), width)) &
                   (open_words::column_sets - 1);
        count_ = word >= 0 ? 1 : !is_set && word <= open_words::first_group ? __popc(columns_) : 0;
        end_ = count_;
#pragma unroll
        for (int step = 1; step < width; step *= 2) {
            const int others = __shfl_up_sync(lanes, end_, step, width);
            if (own >= step) end_ += others;
        }
    }

    /// The i-th code, as `open_words::listed`; the lanes may ask for different ones.
    __device__ int listed(int i) const {
        int from = 0;  // the lane whose word lists it
#pragma unroll
        for (int lane = 0; lane < width; ++lane) from += __shfl_sync(lanes_, end_, lane, width) <= i ? 1 : 0;
        const int word = __shfl_sync(lanes_, word_, from, width);
        unsigned columns = __shfl_sync(lanes_, columns_, from, width);
        int left = i - __shfl_sync(lanes_, end_ - count_, from, width);
        if (from == width) return open_words::none;
        if (word >= 0) return word;
        for (; left > 0; --left) columns &= columns - 1;
        return score_table::code(open_words::first_group - word, __ffs(static_cast<int>(columns)) - 1);
    }

private:
    static constexpr int width = 8;
    unsigned lanes_, columns_;
    int word_, count_, end_;  // end_: codes that this word and those before it list
};

/// What the filter leaves of one warpgroup's 64 rows.
struct row_results {
    static constexpr int rows = scored_rows;
    static constexpr std::int64_t most_codes = 1 << 29;
    static constexpr int wide = 16;                   // of a row's number of words: not all of them are codes
    static constexpr int everything = -1 - wide - 1;  // of one word, which says so

    int code[rows];         // the code, or -1 - n: open, to be settled from n words
    open_words word[rows];  // of an open row
};

/// Tags of groups: the group, and of the tile as much as finds room, descending, so that of equal scores the first is
/// the largest.
inline constexpr int group_tag_bits = 7, group_tag_mask = ~((1 << group_tag_bits) - 1);
inline constexpr int tagged_tiles = 1 << group_tag_bits >> 2;
static_assert(score_table::groups == 4);

/// Whether a codebook has more tiles than a tag tells apart: then filters are those of `Many`.
CUVQ_HOST_DEVICE constexpr bool has_many(int tiles) { return tiles > tagged_tiles; }

#if CUVQ_HAS_WGMMA

/// The largest of each group of a tile, as integers: (2 rows, groups).
struct group_tops {
    int top[2][score_table::groups];

    __device__ explicit group_tops(const float (&score)[64]) {  // (16 pairs of codes, 2 rows, 2)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int g = 0; g < score_table::groups; ++g) {
                const auto at = [&](int c) { return score_at(score, h, g, c); };
                const int most = __vimax3_s32(__vimax3_s32(at(0), at(1), at(2)), at(3), at(4));
                top[h][g] = max(__vimax3_s32(most, at(5), at(6)), at(7));
            }
        }
    }
    __device__ int largest(int half) const {
        return max(__vimax3_s32(top[half][0], top[half][1], top[half][2]), top[half][3]);
    }
    /// A thread's score of row `half`, as an integer.
    __device__ static int score_at(const float (&score)[64], int half, int group, int column) {
        const int place = group * score_table::columns + column;
        return __float_as_int(score[place / 2 * 4 + 2 * half + place % 2]);
    }
};

/// The largest of each column over the tiles, as integers: (2 rows, columns).
struct column_tops {
    int top[2][score_table::columns];

    __device__ column_tops() {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int& t : top[h]) t = device::least_score;
    }
    __device__ void add(const float (&score)[64]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int c = 0; c < score_table::columns; ++c) {
                const auto at = [&](int g) { return group_tops::score_at(score, h, g, c); };
                top[h][c] = __vimax3_s32(__vimax3_s32(top[h][c], at(0), at(1)), at(2), at(3));
            }
        }
    }
    __device__ void merge(const column_tops& others) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int c = 0; c < score_table::columns; ++c) top[h][c] = max(top[h][c], others.top[h][c]);
    }
    /// A bit for each column of a row that reaches `least`.
    __device__ unsigned reaching(int half, int least) const {
        unsigned bits = 0;
#pragma unroll
        for (int c = 0; c < score_table::columns; ++c) bits |= top[half][c] >= least ? 1u << c : 0u;
        return bits;
    }
};

/// The best groups that a thread has seen of a row, and the best of all others. `Many`: of a codebook that `has_many`
/// tiles.
template <bool Many>
struct group_leaders {
    static constexpr int kept = 3;
    int score[kept], tile[kept];  // descending; `tile` if Many
    int rest = device::least_score;

    __device__ group_leaders() {
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            score[i] = device::least_score;
            tile[i] = 0;
        }
    }
    __device__ void offer(const int (&top)[score_table::groups], int of_tile, int mask) {
        const int last = (tagged_tiles - 1 - of_tile % tagged_tiles) * 4;  // the tag of the tile's last group
        int s[score_table::groups];
#pragma unroll
        for (int g = 0; g < score_table::groups; ++g) s[g] = tagged(__int_as_float(top[g]), mask, last | (3 - g));
        const int high0 = max(s[0], s[1]), low0 = min(s[0], s[1]), high1 = max(s[2], s[3]), low1 = min(s[2], s[3]);
        const int second = min(high0, high1), low = max(low0, low1);
        rest = max(rest, min(second, low));  // the third largest
        insert(max(high0, high1), of_tile);
        insert(max(second, low), of_tile);
    }
    /// What another thread kept, of other tiles.
    __device__ void merge(const group_leaders& others) {
        rest = max(rest, others.rest);
#pragma unroll
        for (int i = 0; i < kept; ++i) insert(others.score[i], others.tile[i]);
    }
    __device__ int number(int i, int q) const {
        const int place = ~score[i] & ~group_tag_mask;
        return score_table::number(Many ? tile[i] : place / 4, place % 4, q);
    }

private:
    __device__ void insert(int s, int of_tile) {
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            if (Many) {
                const bool better = s > score[i];
                const int other = tile[i];
                tile[i] = better ? of_tile : other;
                of_tile = better ? other : of_tile;
            }
            const int worse = min(s, score[i]);
            score[i] = max(s, score[i]);
            s = worse;
        }
        rest = max(rest, s);
    }
};

/// What a thread keeps of its two rows, with their error bounds, to find the codes that could win. `Many`: most tiles
/// hold nothing that could still win.
template <bool Many>
class exact_filter {
public:
    static constexpr bool many = Many;

    __device__ exact_filter(float error0, float error1) : error_{error0, error1} {}

    /// A tile's scores. Whole warp.
    __device__ void take(const float (&score)[64], int tile, int mask) {
        const group_tops groups(score);
        if (Many && !__any_sync(0xFFFFFFFFu, groups.largest(0) >= least_[0] || groups.largest(1) >= least_[1])) return;
        lead_[0].offer(groups.top[0], tile, mask);
        lead_[1].offer(groups.top[1], tile, mask);
        columns_.add(score);
        if (Many) {
            least_[0] = limit(0);
            least_[1] = limit(1);
        }
    }

    /// What another warpgroup's thread saw of the same rows, in other tiles.
    __device__ void merge(const exact_filter& others) {
#pragma unroll
        for (int h = 0; h < 2; ++h) lead_[h].merge(others.lead_[h]);
        columns_.merge(others.columns_);
    }

    /// Turns what the four threads of two rows saw, row0 and row0 + 8, into codes, or into words for `settle_rows`. All
    /// four call it; the rows go side by side, since one alone would mostly wait for shuffles.
    __device__ void conclude(int tiles, row_results& results, int row0) const {
        constexpr unsigned all = 0xFFFFFFFFu;
        const int limits[2] = {limit(0), limit(1)}, least[2] = {max(limits[0], 1), max(limits[1], 1)};
        int words[2], next[2], far[2];
        unsigned columns[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            columns[h] = columns_.reaching(h, least[h]);
            words[h] = words_of(lead_[h], columns[h], least[h]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) next[h] = __shfl_xor_sync(all, words[h], 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) far[h] = __shfl_xor_sync(all, words[h] + next[h], 2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int q = static_cast<int>(threadIdx.x) % 4, row = row0 + 8 * h, total = words[h] + next[h] + far[h];
            if (limits[h] > 0 && total == 1) {
                if (words[h] == 1)
                    results.code[row] =
                        score_table::code(lead_[h].number(0, q), __ffs(static_cast<int>(columns[h])) - 1);
                continue;
            }
            const int count = total & (not_listed - 1);
            const bool fits = limits[h] > 0 && count > 0 && count <= open_words::most(tiles);
            if (q == 0)
                results.code[row] =
                    fits ? -1 - (total < not_listed ? count : row_results::wide + count) : row_results::everything;
            if (!fits) {
                if (q == 0) results.word[row].put(0, open_words::everything, tiles);
                continue;
            }
            const int at = (q & 1 ? next[h] & (not_listed - 1) : 0) + (q & 2 ? far[h] & (not_listed - 1) : 0);
            put_words(lead_[h], columns[h], least[h], tiles, results.word[row], at, q);
        }
    }

private:
    static constexpr int not_listed = 1 << 16;  // above all counts of words: some of them do not list codes

    __device__ int limit(int half) const {
        return least_candidate<group_tag_bits>(row_largest(lead_[half].score[0]), error_[half]);
    }
    __device__ static int groups_of(const group_leaders<Many>& lead, int least) {
        int groups = 0;
#pragma unroll
        for (const int s : lead.score) groups += s >= least;
        return groups;
    }
    __device__ static int words_of(const group_leaders<Many>& lead, unsigned columns, int least) {
        if (lead.rest >= least) return not_listed + 1;  // something dropped could win
        const int groups = groups_of(lead, least);
        return min(groups * __popc(columns), 1 + groups);
    }
    __device__ static void put_words(const group_leaders<Many>& lead, unsigned columns, int least, int tiles,
                                     open_words& to, int at, int q) {
        if (lead.rest >= least) {
            to.put(at, open_words::column + q, tiles);
            return;
        }
        const int groups = groups_of(lead, least);
        const bool one_by_one = groups * __popc(columns) <= 1 + groups;  // no more words than a set and its groups take
        if (!one_by_one) to.put(at++, open_words::of_columns(columns, tiles), tiles);
#pragma unroll
        for (int i = 0; i < group_leaders<Many>::kept; ++i) {
            if (lead.score[i] < least) break;
            const int number = lead.number(i, q);
            if (!one_by_one)
                to.put(at++, open_words::first_group - number, tiles);
            else
                for (unsigned left = columns; left != 0; left &= left - 1)
                    to.put(at++, score_table::code(number, __ffs(static_cast<int>(left)) - 1), tiles);
        }
    }

    group_leaders<Many> lead_[2];
    column_tops columns_;
    float error_[2];
    int least_[2] = {device::least_score, device::least_score};  // scores below cannot win any more; if Many
};

/// The same for the best code alone, of equal scores the first. Rows that scores say nothing of are left open.
template <bool Many>
class fast_filter {
public:
    static constexpr bool many = Many;

    __device__ fast_filter(float error0, float error1) : sound_{error0 == error0, error1 == error1} {}

    __device__ void take(const float (&score)[64], int tile, int mask) {
        if (Many) {
            const group_tops groups(score);
            if (!__any_sync(0xFFFFFFFFu, groups.largest(0) >= least_[0] || groups.largest(1) >= least_[1])) return;
        }
        offer_best(score, tile, mask, lead_[0], lead_[1]);
        if (Many) {
            least_[0] = least_candidate(row_largest(lead_[0].best), 0.0f);
            least_[1] = least_candidate(row_largest(lead_[1].best), 0.0f);
        }
    }

    __device__ void merge(const fast_filter& others) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const leaders &other = others.lead_[h], &own = lead_[h];
            const int score = own.best & tag_mask, other_score = other.best & tag_mask;
            if (other_score > score || (other_score == score && other.best_tile < own.best_tile)) lead_[h] = other;
        }
    }

    __device__ void conclude(int tiles, row_results& results, int row0) const {
        constexpr unsigned all = 0xFFFFFFFFu;
        const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int top = row_largest(lead_[h].best) & tag_mask;
            int code = (lead_[h].best & tag_mask) == top ? scored_code(lead_[h].best_tile, place_of(lead_[h].best), q)
                                                         : INT_MAX;
            code = min(code, __shfl_xor_sync(all, code, 1));
            code = min(code, __shfl_xor_sync(all, code, 2));
            if (q != 0) continue;
            const bool ordered = top > 0 && sound_[h];  // integers order positive scores only
            results.code[row0 + 8 * h] = ordered ? code : row_results::everything;
            if (!ordered) results.word[row0 + 8 * h].put(0, open_words::everything, tiles);
        }
    }

private:
    leaders lead_[2];
    bool sound_[2];
    int least_[2] = {device::least_score, device::least_score};  // as in exact_filter
};

#endif  // CUVQ_HAS_WGMMA

/// What a thread's filter takes in memory, at most: exact_filter<true>.
inline constexpr int most_filter_bytes = 136;

}  // namespace cuvq::kernel
