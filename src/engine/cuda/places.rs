//! Places of the experts' entries for products that stream their tokens: each expert's begin with
//! an octet, so that a token tile is a run of bytes (`gather` in kernels/topk_routing.cu, tiles in
//! kernels/common.cuh).

use super::pack;

/// Tokens that lie together.
pub const OCTET: usize = 8;

/// Words of `TokenTile` in kernels/common.cuh.
pub const LISTED_WORDS: usize = 4;

/// Groups of 64 k of an octet that a block brings: `GATHERED_GROUPS` in kernels/topk_routing.cu.
pub const GATHERED_GROUPS: usize = 16;

/// Octets that the entries take at most, however they are spread.
pub fn n_octets(n_entries: usize, n_experts: usize) -> usize {
    // Every expert that has an entry may have seven places without one.
    (n_entries + (OCTET - 1) * n_experts.min(n_entries)) / OCTET
}

/// Elements of the tiles of so many octets.
pub fn tiles_len(n_octets: usize, n_k: usize) -> usize {
    n_octets
        .saturating_mul(OCTET * pack::GROUP_K)
        .saturating_mul(pack::n_groups(n_k))
}

/// Element `k` of a place in tiles of `n_octets` octets.
pub fn at(n_octets: usize, place: usize, k: usize) -> usize {
    let (octet, token) = (place / OCTET, place % OCTET);
    let (group, chunk) = (k / pack::GROUP_K, k % pack::GROUP_K / 8);
    ((group * n_octets + octet) * OCTET + token) * pack::GROUP_K + (chunk ^ token) * 8 + k % 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spread_of_entries_takes_more_octets() {
        for n_experts in [1usize, 5, 32, 128] {
            for n_entries in 1..600usize {
                let most = n_octets(n_entries, n_experts);
                let hit = n_experts.min(n_entries);
                for of_first in [1, 2, 7, 8, 9, n_entries.div_ceil(hit), n_entries + 1 - hit] {
                    // The others have one each but the last, which has what is left.
                    let Some(left) = (n_entries + 1).checked_sub(of_first + hit - 1) else {
                        continue;
                    };
                    let counts = match hit {
                        1 => vec![n_entries],
                        _ if left == 0 => continue,
                        _ => [vec![of_first, left], vec![1; hit - 2]].concat(),
                    };
                    assert_eq!(counts.iter().sum::<usize>(), n_entries);
                    let taken: usize = counts.iter().map(|n| n.div_ceil(OCTET)).sum();
                    assert!(taken <= most, "{counts:?}: {taken} octets, not {most}");
                }
            }
        }
    }

    #[test]
    fn tiles_have_one_element_for_each_place_and_k() {
        let (n_octets, n_k) = (3, 130);
        let mut found = vec![0; tiles_len(n_octets, n_k)];
        for place in 0..n_octets * OCTET {
            for k in 0..pack::n_groups(n_k) * pack::GROUP_K {
                found[at(n_octets, place, k)] += 1;
            }
        }
        assert!(found.iter().all(|&n| n == 1));
        // 64 k of two octets are one run.
        let run = at(n_octets, 8, 64)..at(n_octets, 8, 64) + 2 * OCTET * pack::GROUP_K;
        assert!((8..24).all(|place| (64..128).all(|k| run.contains(&at(n_octets, place, k)))));
    }
}
