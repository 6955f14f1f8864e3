//! Selection of a prefix of the tokens in (logit descending, id ascending) order by radix
//! histogram: by count for top-k, by mass for top-p. Nothing is sorted; the tokens whose leading
//! key bits equal the border's are looked at again with the next bits.

/// The last token of a kept prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Order key of the border's logit.
    key: u32,
    /// Among the tokens with that logit those up to this id are kept.
    last_id: u32,
}

impl Cut {
    /// Whether a token lies in the prefix.
    #[inline]
    pub fn keeps(self, key: u32, id: u32) -> bool {
        key > self.key || (key == self.key && id <= self.last_id)
    }
}

/// A key that orders as the logit does: greater logit, greater key; -0 equals +0.
#[inline]
pub fn order_key(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    let sign = ((bits as i32) >> 31) as u32;
    bits ^ (sign | 0x8000_0000)
}

/// Shift and width of the key bits looked at in each round.
const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
const N_BINS: usize = 1 << 11;

/// Scratch of the selection, allocated once.
#[derive(Debug)]
pub struct PrefixSelect {
    bins: Vec<u64>,
    candidates: Vec<u32>,
}

impl PrefixSelect {
    pub fn new(n_vocab: usize) -> Self {
        Self {
            bins: vec![0; N_BINS],
            candidates: Vec::with_capacity(n_vocab),
        }
    }

    /// The shortest prefix whose measure reaches `target`, or all tokens if none does. `target`
    /// is at least 1; `measure(id)` is a token's weight. `None` for an empty vocabulary.
    pub fn shortest(
        &mut self,
        keys: &[u32],
        target: u64,
        measure: impl Fn(usize) -> u64,
    ) -> Option<Cut> {
        self.candidates.clear();
        self.candidates.extend(0..keys.len() as u32);
        let mut above = 0u64;
        for (shift, width) in DIGITS {
            let digit = |id: u32| (keys[id as usize] >> shift) as usize & ((1 << width) - 1);
            self.bins.fill(0);
            // Bit 63 marks a bin that holds tokens, even ones of measure 0.
            const SEEN: u64 = 1 << 63;
            for &id in &self.candidates {
                let bin = &mut self.bins[digit(id)];
                *bin = (*bin).wrapping_add(measure(id as usize)) | SEEN;
            }
            let mut border = None;
            for (bin, &sum) in self.bins.iter().enumerate().rev() {
                if sum == 0 {
                    continue;
                }
                if let Some((_, lower_sum)) = border {
                    above += lower_sum;
                }
                border = Some((bin, sum & !SEEN));
                if above + (sum & !SEEN) >= target {
                    break;
                }
            }
            let (border, _) = border?;
            self.candidates.retain(|&id| digit(id) == border);
        }
        let &first = self.candidates.first()?;
        let mut last_id = first;
        for &id in &self.candidates {
            last_id = id;
            above += measure(id as usize);
            if above >= target {
                break;
            }
        }
        Some(Cut {
            key: keys[first as usize],
            last_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(logits: &[f32], target: u64, measure: impl Fn(usize) -> u64) -> Vec<u32> {
        let keys: Vec<u32> = logits.iter().map(|&l| order_key(l)).collect();
        let cut = PrefixSelect::new(keys.len())
            .shortest(&keys, target, measure)
            .expect("the vocabulary is not empty");
        (0..keys.len() as u32)
            .filter(|&id| cut.keeps(keys[id as usize], id))
            .collect()
    }

    #[test]
    fn keys_order_as_logits_do() {
        let ascending = [-f32::MAX, -2.0, -1.0, -1e-40, 0.0, 1e-40, 1.0, f32::MAX];
        for pair in ascending.windows(2) {
            assert!(order_key(pair[0]) < order_key(pair[1]), "{pair:?}");
        }
        assert_eq!(order_key(-0.0), order_key(0.0));
    }

    #[test]
    fn ties_at_the_border_go_to_the_lower_ids() {
        let logits = [1.0, 2.0, 1.0, 2.0, 1.0, 0.0, -0.0];
        assert_eq!(kept(&logits, 1, |_| 1), [1]);
        assert_eq!(kept(&logits, 2, |_| 1), [1, 3]);
        assert_eq!(kept(&logits, 3, |_| 1), [0, 1, 3]);
        assert_eq!(kept(&logits, 4, |_| 1), [0, 1, 2, 3]);
        assert_eq!(kept(&logits, 6, |_| 1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(kept(&logits, 7, |_| 1), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_target_beyond_the_sum_keeps_all() {
        assert_eq!(kept(&[3.0, 1.0, 2.0], 10, |_| 1), [0, 1, 2]);
        assert_eq!(kept(&[3.0, 1.0, 2.0], 1, |_| 0), [0, 1, 2]);
        assert_eq!(kept(&[1.0, 1.0], 5, |_| 2), [0, 1]);
    }
}
