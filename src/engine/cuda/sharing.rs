//! Which rows of a decode step read the same pages, so that a page is read once for all of them.
//!
//! Rows that share a prefix have the same pages at the same places of their tables. A work item is
//! a run of such pages and up to 16 rows (as many as a block has queries for) that see them whole;
//! rows' own pages are left to the kernel that goes row by row. Prefixes of prefixes (a system
//! prompt, under it a row's prompt, under it its samples) become items of several depths.

use super::buffer::Plain;

/// Most rows of an item.
pub const MAX_ROWS: usize = 16;

/// As `SharedItem` in kernels/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedItem {
    /// A sequence that has the pages.
    pub sequence: u32,
    pub first_split: u32,
    pub n_splits: u32,
    /// The splits are folded into the last one's place.
    pub folded: u32,
    pub n_rows: u32,
    pub rows: [u32; MAX_ROWS],
}

// SAFETY: words alone.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Plain for SharedItem {}

/// A live row of a step.
#[derive(Clone, Copy, Debug)]
pub struct LiveRow<'a> {
    pub row: u32,
    pub sequence: u32,
    /// Pages that it sees whole.
    pub pages: &'a [u32],
}

/// Items of a step, and what is left to the rows' own blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    pub items: Vec<SharedItem>,
    /// Of each row: how many of its splits are in items, and the first place of its partial
    /// results that counts.
    pub rows: Vec<[u32; 2]>,
}

impl Sharing {
    /// `n_rows` rows of which `live` are such, blocks of up to `row_capacity` rows; a run of pages
    /// is one item where there are at least `n_items` items without cutting it.
    pub fn new(n_rows: usize, live: &[LiveRow<'_>], row_capacity: usize, n_items: usize) -> Self {
        let mut sharing = Self {
            items: Vec::new(),
            rows: vec![[0; 2]; n_rows],
        };
        if row_capacity < 2 {
            return sharing;
        }
        let mut sorted = live.to_vec();
        sorted.sort_by(|a, b| a.pages.cmp(b.pages).then(a.row.cmp(&b.row)));
        sharing.divide(&sorted, 0, row_capacity.min(MAX_ROWS), n_items);
        sharing
    }

    /// Rows that have the same pages before `depth`, in the order of their pages.
    fn divide(&mut self, rows: &[LiveRow<'_>], depth: usize, capacity: usize, n_items: usize) {
        let at_depth = |row: &LiveRow<'_>| row.pages.get(depth).copied();
        for group in rows.chunk_by(|a, b| at_depth(a) == at_depth(b)) {
            let ([first, .., last], Some(_)) = (group, at_depth(&group[0])) else {
                continue;
            };
            // In sorted order the first and the last have the fewest pages in common.
            let common = first.pages.iter().zip(last.pages);
            let end = common.take_while(|(a, b)| a == b).count();
            let whole = depth == 0 && group.len().div_ceil(capacity) >= n_items;
            for rows in group.chunks(capacity) {
                self.add(rows, depth..end, whole);
            }
            self.divide(group, end, capacity, n_items);
        }
    }

    fn add(&mut self, rows: &[LiveRow<'_>], splits: std::ops::Range<usize>, whole: bool) {
        let mut item = SharedItem {
            sequence: rows[0].sequence,
            first_split: splits.start as u32,
            n_splits: splits.len() as u32,
            folded: u32::from(whole),
            n_rows: rows.len() as u32,
            ..SharedItem::default()
        };
        for (place, row) in item.rows.iter_mut().zip(rows) {
            *place = row.row;
            let first = if whole {
                splits.end - 1
            } else {
                self.rows[row.row as usize][1] as usize
            };
            self.rows[row.row as usize] = [splits.end as u32, first as u32];
        }
        if whole {
            self.items.push(item);
            return;
        }
        item.n_splits = 1;
        for split in splits {
            item.first_split = split as u32;
            self.items.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live<'a>(pages: &'a [Vec<u32>]) -> Vec<LiveRow<'a>> {
        let rows = pages.iter().enumerate();
        rows.map(|(row, pages)| LiveRow {
            row: row as u32,
            sequence: 100 + row as u32,
            pages,
        })
        .collect()
    }

    /// Every split of every row is in one item or left to the row.
    fn check(sharing: &Sharing, pages: &[Vec<u32>]) {
        for (row, pages) in pages.iter().enumerate() {
            let [n_shared, _] = sharing.rows[row];
            let mut seen = vec![0; pages.len()];
            for item in &sharing.items {
                let rows = &item.rows[..item.n_rows as usize];
                if !rows.contains(&(row as u32)) {
                    continue;
                }
                for split in item.first_split..item.first_split + item.n_splits {
                    seen[split as usize] += 1;
                }
            }
            for (split, &n) in seen.iter().enumerate() {
                assert_eq!(
                    n,
                    u32::from((split as u32) < n_shared),
                    "row {row} split {split}"
                );
            }
        }
    }

    #[test]
    fn rows_of_their_own_are_left_alone() {
        let pages = [vec![1, 2], vec![3], vec![]];
        let sharing = Sharing::new(4, &live(&pages), 16, 1);
        assert!(sharing.items.is_empty());
        assert_eq!(sharing.rows, vec![[0; 2]; 4]);
    }

    #[test]
    fn a_prefix_is_read_once_for_sixteen_rows() {
        let pages: Vec<Vec<u32>> = (0..40).map(|row| vec![7, 8, 9, 100 + row]).collect();
        let folded = Sharing::new(40, &live(&pages), 16, 3);
        check(&folded, &pages);
        assert_eq!(folded.items.len(), 3);
        assert!(
            folded
                .items
                .iter()
                .all(|item| item.folded == 1 && item.n_splits == 3)
        );
        assert!(folded.rows.iter().all(|&row| row == [3, 2]));
        let cut = Sharing::new(40, &live(&pages), 16, 4);
        check(&cut, &pages);
        assert_eq!(cut.items.len(), 9);
        assert!(cut.rows.iter().all(|&row| row == [3, 0]));
    }

    #[test]
    fn prefixes_of_prefixes_are_items_of_their_own() {
        // A system prompt of two pages, rows' prompts of one or two, samples of each.
        let mut pages = Vec::new();
        for prompt in 0..5u32 {
            for sample in 0..3u32 {
                let mut of_row = vec![1, 2, 10 + prompt];
                if prompt % 2 == 0 {
                    of_row.push(20 + prompt);
                }
                of_row.push(100 + prompt * 10 + sample);
                pages.push(of_row);
            }
        }
        pages.push(vec![1]);
        pages.push(vec![50, 51]);
        for n_items in [1, 2] {
            let sharing = Sharing::new(20, &live(&pages), 16, n_items);
            check(&sharing, &pages);
            assert_eq!(sharing.rows[0][0], 4);
            assert_eq!(sharing.rows[3][0], 3);
            assert_eq!(sharing.rows[15][0], 1);
            assert_eq!(sharing.rows[16][0], 0);
        }
    }

    #[test]
    fn a_block_for_one_row_shares_nothing() {
        let pages = [vec![1, 2], vec![1, 3]];
        assert!(Sharing::new(2, &live(&pages), 1, 1).items.is_empty());
    }
}
