// The next token of each row: the rule of src/engine/sample, bit for bit. Order: temperature,
// top-k, top-p, renormalize; the nucleus by radix histogram over integer masses, then the greatest
// scaled logit plus Gumbel noise of a counter-based generator. Integer sums are free of order, so
// threads may split the row in any way; exp and ln are the same sums and products as on the CPU
// (kernels are compiled without contraction).
//
// Two kernels go over a row, whose greatest logit the lm head tells: `tally` for its mass and, where
// the token is already decided by greatest values alone, for that, by parts of the row, so that few
// rows keep the whole GPU busy. `sample` joins the parts, and goes over the row itself where a nucleus
// is cut out.
//
//   logits    f32 [n_rows, n_vocab]
//   maxima    [n_rows], keys of the rows' greatest; zeros again behind `sample`
//   slots     updated: token, position, count, live
//   events    [step][n_rows], written: what the host polls
//   partials  [n_rows][n_parts], between the kernels
//
// tally: grid (n_rows, n_parts), block PART_THREADS; sample: grid (n_rows), block THREADS.

#define MASS_BITS 44
#define N_BINS 2048
#define PART_THREADS 256
#define THREADS 512
#define WARPS (THREADS / 32)

// As `Event` in src/engine/cuda/decode.rs.
struct Event {
    u64 logits_hash;
    u32 slot;
    u32 position;
    u32 token;
    float logprob;
    // 0 no row, 1 a token, 3 a token and a stop id, 5 a token and the length reached, 8 logits
    // that are not finite.
    u32 state;
    u32 padding;
};

// What one part of a row comes to: SAMPLE_PARTIAL_LEN words of 64 bits in src/engine/cuda/memory.rs.
struct Partial {
    u64 hash;
    // The mass, and the greatest score with the lowest id that has it.
    u64 total;
    double best;
    u32 best_id;
    // Some logit is not finite.
    u32 special;
};

struct SampleArgs {
    const float* logits;
    u32* maxima;
    Slot* slots;
    const Row* rows;
    Event* events;
    // Steps begun since the host reset it.
    const u32* step;
    Partial* partials;
    u32 n_parts;
    u32 n_vocab;
    u32 max_context;
    u32 trace_hash;
};

// The finalizer of splitmix64.
__device__ __forceinline__ u64 mix(u64 word) {
    word += 0x9e3779b97f4a7c15ull;
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}

// In [256, 512) a double's last place is 2^-44.
#define MASS_BASE 384.0

// exp of x <= 0 in units of 2^-44 (src/engine/sample/softmax.rs), and the bits of MASS_BASE.
__device__ __forceinline__ u64 mass_above_base(float x) {
    const float ROUND = 12582912.0f;
    x = x > -80.0f ? x : -80.0f;
    float shifted = x * 1.44269504088896340736f + ROUND;
    float n = shifted - ROUND;
    float r = (x - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    u32 exponent = (u32)__float_as_int(shifted) - (u32)__float_as_int(ROUND) + 127u;
    float e = p * __int_as_float((int)(exponent << 23));
    return (u64)__double_as_longlong((double)e + MASS_BASE);
}

__device__ __forceinline__ u64 mass_base() { return (u64)__double_as_longlong(MASS_BASE); }
__device__ __forceinline__ u64 mass(float x) { return mass_above_base(x) - mass_base(); }

__device__ __forceinline__ double ln(double x) {
    u64 bits = (u64)__double_as_longlong(x);
    int exponent = (int)((bits >> 52) & 0x7ff) - 1023;
    double m = __longlong_as_double((long long)((bits & ((1ull << 52) - 1)) | (1023ull << 52)));
    if (m > 1.41421356237309504880) {
        m *= 0.5;
        exponent += 1;
    }
    double s = (m - 1.0) / (m + 1.0);
    double z = s * s;
    double p = 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    p = p * z + 1.0 / 3.0;
    p = p * z + 1.0 / 1.0;
    double n = (double)exponent;
    return n * 6.931471803691238e-1 + (n * 1.9082149292705877e-10 + 2.0 * s * p);
}

struct Words {
    u32 w[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
__device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 wide0 = (u64)0xD2511F53u * c0, wide1 = (u64)0xCD9E8D57u * c2;
        u32 n0 = (u32)(wide1 >> 32) ^ c1 ^ k0, n2 = (u32)(wide0 >> 32) ^ c3 ^ k1;
        c1 = (u32)wide1;
        c3 = (u32)wide0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Words words = {{c0, c1, c2, c3}};
    return words;
}

// Values of a block's warps.
template <int N> struct Warps {
    u64 sums[N];
    double scores[N];
    u32 ids[N];
};

struct Shared {
    u64 bins[N_BINS];
    u32 seen[N_BINS / 32];
    Warps<WARPS> warps;
    u32 votes[WARPS];
    u64 above;
    u32 border;
    u32 count;
};

__device__ __forceinline__ u64 warp_total(u64 x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(NONE, x, mask);
    return x;
}

template <int N> __device__ __forceinline__ u64 block_sum(u64 x, Warps<N>& warps) {
    x = warp_total(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps.sums[threadIdx.x / 32] = x;
    __syncthreads();
    u64 sum = 0;
    for (int warp = 0; warp < N; warp++) sum += warps.sums[warp];
    return sum;
}

// The greatest score, the lowest id among equals; NONE has no score.
struct Best {
    double score;
    u32 id;

    __device__ __forceinline__ void offer(double other, u32 other_id) {
        if (other_id != NONE && (id == NONE || other > score || (other == score && other_id < id))) {
            score = other;
            id = other_id;
        }
    }
};

__device__ __forceinline__ Best warp_best(Best best) {
    for (int mask = 16; mask > 0; mask >>= 1) {
        double score = __shfl_xor_sync(NONE, best.score, mask);
        u32 id = __shfl_xor_sync(NONE, best.id, mask);
        best.offer(score, id);
    }
    return best;
}

// Every thread gets the block's.
template <int N> __device__ __forceinline__ Best block_best(Best best, Warps<N>& warps) {
    best = warp_best(best);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        warps.scores[threadIdx.x / 32] = best.score;
        warps.ids[threadIdx.x / 32] = best.id;
    }
    __syncthreads();
    best = {warps.scores[0], warps.ids[0]};
    for (int warp = 1; warp < N; warp++) best.offer(warps.scores[warp], warps.ids[warp]);
    return best;
}

// The last token of a kept prefix in (logit descending, id ascending) order.
struct Cut {
    u32 key;
    u32 last_id;
};

__device__ __forceinline__ bool keeps(Cut cut, u32 key, u32 id) {
    return key > cut.key || (key == cut.key && id <= cut.last_id);
}

// The shortest prefix whose measure reaches `target`: a count of tokens, or their mass.
template <bool BY_MASS>
__device__ Cut shortest(const float* logits, u32 n_vocab, float max, float temperature, u64 target, Shared& s) {
    u64 above = 0;
    u32 prefix = 0, prefix_mask = 0;
    const int shifts[3] = {21, 10, 0};
    const u32 digit_masks[3] = {2047, 2047, 1023};
    for (int d = 0; d < 3; d++) {
        int shift = shifts[d];
        for (u32 i = threadIdx.x; i < N_BINS; i += THREADS) s.bins[i] = 0;
        for (u32 i = threadIdx.x; i < N_BINS / 32; i += THREADS) s.seen[i] = 0;
        __syncthreads();
        for (u32 id = threadIdx.x; id < n_vocab; id += THREADS) {
            u32 key = order_key(logits[id]);
            if ((key & prefix_mask) != prefix) continue;
            u32 digit = (key >> shift) & digit_masks[d];
            u64 measure = BY_MASS ? mass((logits[id] - max) / temperature) : 1;
            atomicAdd(&s.bins[digit], measure);
            // A bin may hold tokens of mass 0 alone.
            atomicOr(&s.seen[digit / 32], 1u << (digit % 32));
        }
        __syncthreads();
        // From the greatest bin down: 64 bins a lane of the first warp.
        if (threadIdx.x < 32) {
            u32 lane = threadIdx.x;
            u32 top = N_BINS - 1 - lane * 64;
            u64 sum = 0;
            u32 lowest_seen = NONE;
            for (u32 i = 0; i < 64; i++) {
                u32 bin = top - i;
                if (s.seen[bin / 32] >> (bin % 32) & 1) {
                    sum += s.bins[bin];
                    lowest_seen = bin;
                }
            }
            u64 before = sum;
            for (int step = 1; step < 32; step *= 2) {
                u64 other = __shfl_up_sync(NONE, before, step);
                if ((int)lane >= step) before += other;
            }
            u64 total = __shfl_sync(NONE, before, 31);
            before -= sum;
            bool reaches = lowest_seen != NONE && above + before + sum >= target;
            u32 reaching = __ballot_sync(NONE, reaches);
            u32 holding = __ballot_sync(NONE, lowest_seen != NONE);
            if (reaching != 0) {
                if ((int)lane == __ffs((int)reaching) - 1) {
                    u64 at = above + before;
                    for (u32 i = 0; i < 64; i++) {
                        u32 bin = top - i;
                        if (!(s.seen[bin / 32] >> (bin % 32) & 1)) continue;
                        if (at + s.bins[bin] >= target) {
                            s.border = bin;
                            s.above = at;
                            break;
                        }
                        at += s.bins[bin];
                    }
                }
            } else if ((int)lane == 31 - __clz((int)holding)) {
                // No prefix reaches it: all tokens.
                s.border = lowest_seen;
                s.above = above + total - s.bins[lowest_seen];
            }
        }
        __syncthreads();
        prefix |= s.border << shift;
        prefix_mask |= digit_masks[d] << shift;
        above = s.above;
        __syncthreads();
    }
    // Equal logits have equal measures: how many of them, then the last one's id.
    u64 each = BY_MASS ? 0 : 1;
    if (BY_MASS) {
        each = mass((value_of_key(prefix) - max) / temperature);
    }
    u64 missing = target > above ? target - above : 1;
    u64 wanted = each == 0 ? ~0ull : (missing + each - 1) / each;
    if (wanted == 0) wanted = 1;
    u64 n_before = 0;
    Cut cut = {prefix, 0};
    for (u32 first = 0; first < n_vocab && n_before < wanted; first += THREADS) {
        u32 id = first + threadIdx.x;
        bool equal = id < n_vocab && order_key(logits[id]) == prefix;
        u32 votes = __ballot_sync(NONE, equal);
        if (threadIdx.x % 32 == 0) s.votes[threadIdx.x / 32] = votes;
        __syncthreads();
        // Every thread walks the same words.
        for (u32 warp = 0; warp < WARPS && n_before < wanted; warp++) {
            u32 word = s.votes[warp];
            while (word != 0 && n_before < wanted) {
                cut.last_id = first + warp * 32 + (u32)__ffs((int)word) - 1;
                word &= word - 1;
                n_before += 1;
            }
        }
        __syncthreads();
    }
    return cut;
}

// A row's slot, NONE for padding.
__device__ __forceinline__ u32 slot_of_row(const SampleArgs& args) { return args.rows[blockIdx.x].sequence; }

// Which ids are a block's: whole fours, as the generator gives them.
struct Part {
    u32 first, end;

    __device__ __forceinline__ Part(const SampleArgs& args) {
        u32 share = (args.n_vocab + args.n_parts * 4 - 1) / (args.n_parts * 4) * 4;
        first = blockIdx.y * share;
        end = first + share < args.n_vocab ? first + share : args.n_vocab;
    }
};

__device__ __forceinline__ Partial* partial_of(const SampleArgs& args, u32 part) {
    return args.partials + (u64)blockIdx.x * args.n_parts + part;
}

// Whether a logit of the row is not finite. Every warp goes over all parts.
__device__ __forceinline__ bool is_special(const SampleArgs& args) {
    u32 special = 0;
    for (u32 part = threadIdx.x % 32; part < args.n_parts; part += 32) special |= partial_of(args, part)->special;
    return __any_sync(NONE, (int)special);
}

// The greatest scaled logit plus Gumbel noise among the fours first, first + step.. below `end` of
// the thread, of those that are kept where `cuts`.
__device__ __forceinline__ Best draw(
    const SampleArgs& args, const Slot* slot, const float* logits, float max, u32 first, u32 end, u32 step, bool cuts, Cut cut
) {
    Best best = {__longlong_as_double((long long)0xFFF0000000000000ull), NONE};
    u64 row_hash = slot->row_hash, seed = slot->seed;
    float temperature = slot->temperature;
    Words start = philox((u32)row_hash, (u32)(row_hash >> 32), slot->sample, slot->position + 1, (u32)seed, (u32)(seed >> 32));
    for (u32 four = first; four < end; four += step) {
        Words words = philox(four / 4, 0, start.w[2], start.w[3], start.w[0], start.w[1]);
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 id = four + i;
            if (id >= end) break;
            double scaled = (double)((logits[id] - max) / temperature);
            // A bound first: the two logarithms are needed for few tokens only.
            double bound = (double)(__clz((int)~words.w[i]) + 1) * (0.69314718055994530942 + 1e-9);
            if (scaled + bound <= best.score) continue;
            if (cuts && !keeps(cut, order_key(logits[id]), id)) continue;
            double u = ((double)words.w[i] + 0.5) * 2.3283064365386962890625e-10;
            double score = scaled + -ln(-ln(u));
            if (score > best.score) best = {score, id};
        }
    }
    return best;
}

// Whether tokens are left out before one is drawn.
__device__ __forceinline__ bool cuts_by_k(const Slot* slot, u32 n_vocab) { return slot->top_k > 0 && slot->top_k < n_vocab; }
__device__ __forceinline__ bool is_cut(const Slot* slot, u32 n_vocab) {
    return slot->temperature > 0.0f && (cuts_by_k(slot, n_vocab) || slot->keeps_p);
}

// A thread's logits of a round: FOURS of four that follow each other, of which a block's lie side by side.
constexpr u32 FOURS = 2;

struct Batch {
    float v[FOURS][4];
};

__device__ __forceinline__ u32 id_of_four(u32 first, u32 four) { return first + four * PART_THREADS * 4; }

// Those behind `end` become numbers without mass.
__device__ __forceinline__ void load_batch(const float* logits, u32 first, u32 end, bool aligned, Batch& batch) {
    const float LOWEST = -3.402823466e38f;
    if (aligned && id_of_four(first, FOURS - 1) + 4 <= end) {
        #pragma unroll
        for (u32 four = 0; four < FOURS; four++) {
            float4 x = *(const float4*)(logits + id_of_four(first, four));
            batch.v[four][0] = x.x;
            batch.v[four][1] = x.y;
            batch.v[four][2] = x.z;
            batch.v[four][3] = x.w;
        }
        return;
    }
    #pragma unroll
    for (u32 four = 0; four < FOURS; four++) {
        #pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 id = id_of_four(first, four) + i;
            batch.v[four][i] = id < end ? logits[id] : LOWEST;
        }
    }
}

extern "C" __global__ void __launch_bounds__(PART_THREADS) tally(const SampleArgs args) {
    __shared__ Warps<PART_THREADS / 32> warps;
    follow_previous();
    u32 slot_index = slot_of_row(args);
    if (slot_index == NONE) return;
    const Slot* slot = args.slots + slot_index;
    const float* logits = args.logits + (u64)blockIdx.x * args.n_vocab;
    Part part(args);
    float max = value_of_key(args.maxima[blockIdx.x]);
    bool greedy = !(slot->temperature > 0.0f);
    // Rows begin with whole fours.
    bool aligned = args.n_vocab % 4 == 0;
    u64 total = 0;
    // NaN behind an infinity or a NaN.
    float finite = 0.0f;
    // Greedy: the lowest id of the greatest logit.
    Best best = {0.0, NONE};
    u32 first = part.first + threadIdx.x * 4;
    Batch next;
    if (first < part.end) load_batch(logits, first, part.end, aligned, next);
    while (first < part.end) {
        const Batch batch = next;
        u32 following = id_of_four(first, FOURS);
        // While this one is gone through.
        if (following < part.end) load_batch(logits, following, part.end, aligned, next);
        bool has_greatest = false;
        #pragma unroll
        for (u32 four = 0; four < FOURS; four++) {
            #pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float x = batch.v[four][i];
                finite = __fmaf_rn(x, 0.0f, finite);
                has_greatest |= x == max;
                total += mass_above_base(x - max);
            }
        }
        total -= FOURS * 4 * mass_base();
        if (greedy && has_greatest) {
            #pragma unroll
            for (u32 four = 0; four < FOURS; four++) {
                #pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 id = id_of_four(first, four) + i;
                    if (batch.v[four][i] == max && id < best.id) best.id = id;
                }
            }
        }
        first = following;
    }
    if (!greedy && !is_cut(slot, args.n_vocab)) {
        best = draw(args, slot, logits, max, part.first + threadIdx.x * 4, part.end, PART_THREADS * 4, false, {0, 0});
    }
    total = block_sum(total, warps);
    best = block_best(best, warps);
    u32 special = (u32)__syncthreads_or(finite != finite);
    u64 hash = 0;
    if (args.trace_hash) {
        for (u32 id = part.first + threadIdx.x; id < part.end; id += PART_THREADS) {
            hash += mix((u64)id << 32 | (u32)__float_as_int(logits[id]));
        }
        hash = block_sum(hash, warps);
    }
    if (threadIdx.x != 0) return;
    *partial_of(args, blockIdx.y) = {hash, total, best.score, best.id, special};
}

// The token of a row out of whose tokens some are left out first.
__device__ __forceinline__ Best sample_cut(const SampleArgs& args, const Slot* slot, const float* logits, float max, Shared& s) {
    u32 n_vocab = args.n_vocab;
    float temperature = slot->temperature;
    Cut cut = {0, 0};
    bool cuts = false;
    if (cuts_by_k(slot, n_vocab)) {
        cut = shortest<false>(logits, n_vocab, max, temperature, slot->top_k, s);
        cuts = true;
    }
    if (slot->keeps_p) {
        u64 kept = 0;
        for (u32 id = threadIdx.x; id < n_vocab; id += THREADS) {
            if (!cuts || keeps(cut, order_key(logits[id]), id)) kept += mass((logits[id] - max) / temperature);
        }
        kept = block_sum(kept, s.warps);
        // kept * share / 2^53, rounded up, within 1 and kept.
        u64 low = kept * slot->top_p_share, high = __umul64hi(kept, slot->top_p_share);
        u64 rounded = low + ((1ull << 53) - 1);
        high += rounded < low;
        u64 target = high << 11 | rounded >> 53;
        u64 most = kept > 1 ? kept : 1;
        target = target < 1 ? 1 : target > most ? most : target;
        cut = shortest<true>(logits, n_vocab, max, temperature, target, s);
    }
    return block_best(draw(args, slot, logits, max, threadIdx.x * 4, n_vocab, THREADS * 4, true, cut), s.warps);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(const SampleArgs args) {
    __shared__ Shared s;
    follow_previous();
    Event* event = args.events + (u64)(*args.step - 1) * gridDim.x + blockIdx.x;
    u32 slot_index = slot_of_row(args);
    float max = value_of_key(args.maxima[blockIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) args.maxima[blockIdx.x] = 0;
    if (slot_index == NONE) {
        if (threadIdx.x == 0) event->state = 0;
        return;
    }
    Slot* slot = args.slots + slot_index;
    const float* logits = args.logits + (u64)blockIdx.x * args.n_vocab;
    if (is_special(args)) {
        if (threadIdx.x == 0) {
            event->slot = slot_index;
            event->position = slot->position + 1;
            event->state = 8;
            slot->live = 0;
        }
        return;
    }
    Best best = {0.0, NONE};
    if (is_cut(slot, args.n_vocab)) best = sample_cut(args, slot, logits, max, s);
    // One warp joins the parts.
    if (threadIdx.x >= 32) return;
    u64 hash = 0, total = 0;
    for (u32 part = threadIdx.x; part < args.n_parts; part += 32) {
        const Partial* of_part = partial_of(args, part);
        hash += of_part->hash;
        total += of_part->total;
        best.offer(of_part->best, of_part->best_id);
    }
    hash = warp_total(hash);
    total = warp_total(total);
    best = warp_best(best);
    if (threadIdx.x != 0) return;
    if (args.trace_hash) hash = mix(hash ^ args.n_vocab);
    u32 best_id = best.id == NONE ? 0 : best.id;
    double ln_total = ln((double)total) - (double)MASS_BITS * 0.69314718055994530942;
    // As the key of the greatest, a zero has no sign.
    float logprob = (float)(((double)(logits[best_id] + 0.0f) - (double)max) - ln_total);
    u32 position = slot->position + 1;
    u32 n_generated = slot->n_generated + 1;
    u32 state = 1;
    for (u32 i = 0; i < slot->n_stop; i++) {
        if (slot->stop[i] == best_id) state = 3;
    }
    if (state == 1 && (n_generated >= slot->max_new_tokens || position + 1 >= args.max_context)) state = 5;
    slot->token = best_id;
    slot->position = position;
    slot->n_generated = n_generated;
    slot->live = state == 1;
    event->logits_hash = hash;
    event->slot = slot_index;
    event->position = position;
    event->token = best_id;
    event->logprob = logprob;
    event->state = state;
}
