//! Bookkeeping of the KV arena: which page belongs to which sequences, and how long each
//! sequence is. The bytes are the backend's; this file only counts.
//!
//! A page is free or referenced, never both. Whole pages of a shared prefix are referenced by
//! every sequence that holds it and are never written again; a partly filled last page is copied
//! into a private one. The caller tells the backend what changed (`Backend::map_page`, `fork`).

use super::{PAGE_POSITIONS, PageId, SequenceId};

/// Pages that hold `n_positions` positions.
pub fn pages_for(n_positions: usize) -> usize {
    n_positions.div_ceil(PAGE_POSITIONS)
}

/// The free pages do not suffice; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} pages are needed, {free} are free")]
pub struct OutOfPages {
    pub needed: usize,
    pub free: usize,
}

/// What [`KvArena::share`] gave to the new sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Whole pages that both sequences now reference.
    pub n_pages: usize,
    /// The source's partly filled last page and the private page for its copy.
    pub tail: Option<(PageId, PageId)>,
}

/// A sequence's page table and length.
#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<PageId>,
    n_positions: usize,
}

/// Reference-counted pages and the sequences that hold them.
#[derive(Clone, Debug)]
pub struct KvArena {
    n_references: Vec<u32>,
    free: Vec<PageId>,
    sequences: Vec<Sequence>,
}

impl KvArena {
    /// All pages free, all sequences empty.
    pub fn new(n_pages: usize, n_sequences: usize) -> Self {
        Self {
            n_references: vec![0; n_pages],
            // Popped from the end, so the lowest page goes first.
            free: (0..n_pages as u32).rev().map(PageId).collect(),
            sequences: vec![Sequence::default(); n_sequences],
        }
    }

    pub fn n_pages(&self) -> usize {
        self.n_references.len()
    }

    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Positions the sequence holds.
    pub fn length(&self, sequence: SequenceId) -> usize {
        self.sequence(sequence).n_positions
    }

    /// The sequence's page table.
    pub fn pages(&self, sequence: SequenceId) -> &[PageId] {
        &self.sequence(sequence).pages
    }

    /// Pages that [`assign`](Self::assign) would take.
    pub fn n_missing(&self, sequence: SequenceId, n_positions: usize) -> usize {
        pages_for(n_positions).saturating_sub(self.pages(sequence).len())
    }

    /// Gives the sequence private pages until it has room for `n_positions`; returns the page
    /// table indices that are new.
    ///
    /// # Errors
    /// [`OutOfPages`] when too few are free; nothing is changed then.
    pub fn assign(
        &mut self,
        sequence: SequenceId,
        n_positions: usize,
    ) -> Result<std::ops::Range<usize>, OutOfPages> {
        let needed = self.n_missing(sequence, n_positions);
        let free = self.n_free();
        if needed > free {
            return Err(OutOfPages { needed, free });
        }
        let first = self.pages(sequence).len();
        for _ in 0..needed {
            let page = self.take().ok_or(OutOfPages { needed, free })?;
            self.sequence_mut(sequence).pages.push(page);
        }
        Ok(first..first + needed)
    }

    /// Counts `n_positions` more as written.
    ///
    /// # Panics
    /// When the sequence has no room for them: pages are assigned ahead.
    pub fn advance(&mut self, sequence: SequenceId, n_positions: usize) {
        let sequence = self.sequence_mut(sequence);
        sequence.n_positions += n_positions;
        assert!(
            pages_for(sequence.n_positions) <= sequence.pages.len(),
            "positions are written into assigned pages only"
        );
    }

    /// Makes the empty sequence `to` begin with all positions of `from`.
    ///
    /// # Errors
    /// [`OutOfPages`] when the tail needs a page and none is free; nothing is changed then.
    ///
    /// # Panics
    /// When `to` is not empty.
    pub fn share(&mut self, from: SequenceId, to: SequenceId) -> Result<Shared, OutOfPages> {
        assert!(
            self.sequence(to).pages.is_empty() && from != to,
            "a prefix is shared into an empty sequence"
        );
        let n_positions = self.length(from);
        let n_pages = n_positions / PAGE_POSITIONS;
        let tail = match self.pages(from).get(n_pages) {
            Some(&source) if !n_positions.is_multiple_of(PAGE_POSITIONS) => {
                let copy = self.take().ok_or(OutOfPages { needed: 1, free: 0 })?;
                Some((source, copy))
            }
            _ => None,
        };
        let mut pages = self.pages(from)[..n_pages].to_vec();
        for page in &pages {
            self.n_references[page.0 as usize] += 1;
        }
        pages.extend(tail.map(|(_, copy)| copy));
        *self.sequence_mut(to) = Sequence { pages, n_positions };
        Ok(Shared { n_pages, tail })
    }

    /// Empties a sequence; pages that nobody else references become free. Returns how many did.
    pub fn release(&mut self, sequence: SequenceId) -> usize {
        let free_before = self.n_free();
        let emptied = std::mem::take(self.sequence_mut(sequence));
        for page in emptied.pages {
            let n_references = &mut self.n_references[page.0 as usize];
            assert!(*n_references > 0, "page {} is freed twice", page.0);
            *n_references -= 1;
            if *n_references == 0 {
                self.free.push(page);
            }
        }
        self.n_free() - free_before
    }

    fn take(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        let n_references = &mut self.n_references[page.0 as usize];
        assert_eq!(*n_references, 0, "page {} is free and referenced", page.0);
        *n_references = 1;
        Some(page)
    }

    // Sequence ids come from the shape the arena was made with, never from outside.
    fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[id.0 as usize]
    }

    fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        &mut self.sequences[id.0 as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: SequenceId = SequenceId(0);
    const B: SequenceId = SequenceId(1);

    #[test]
    fn a_fork_shares_whole_pages_and_copies_the_tail() {
        let mut arena = KvArena::new(5, 2);
        assert_eq!(arena.assign(A, 600), Ok(0..3));
        arena.advance(A, 600);
        let shared = arena.share(A, B).expect("two pages are free");
        assert_eq!(shared.n_pages, 2);
        assert_eq!(shared.tail, Some((PageId(2), PageId(3))));
        assert_eq!(arena.pages(B), [PageId(0), PageId(1), PageId(3)]);
        assert_eq!(arena.length(B), 600);
        assert_eq!(arena.n_free(), 1);
        assert_eq!(arena.release(A), 1, "only the tail was private");
        assert_eq!(arena.release(B), 3);
        assert_eq!(arena.n_free(), 5);
    }

    #[test]
    fn a_fork_on_a_page_border_takes_no_page() {
        let mut arena = KvArena::new(2, 2);
        assert_eq!(arena.assign(A, 512), Ok(0..2));
        arena.advance(A, 512);
        let shared = arena.share(A, B).expect("no page is needed");
        assert_eq!((shared.n_pages, shared.tail), (2, None));
    }

    #[test]
    fn too_few_pages_change_nothing() {
        let mut arena = KvArena::new(2, 2);
        assert_eq!(arena.assign(A, 513), Err(OutOfPages { needed: 3, free: 2 }));
        assert_eq!(arena.n_free(), 2);
        assert_eq!(arena.assign(A, 300), Ok(0..2));
        arena.advance(A, 300);
        assert_eq!(arena.share(A, B), Err(OutOfPages { needed: 1, free: 0 }));
        assert!(arena.pages(B).is_empty());
    }

    /// Every page is free once or referenced as often as the tables say.
    fn assert_consistent(arena: &KvArena) {
        let mut n_free = vec![0u32; arena.n_pages()];
        for page in &arena.free {
            n_free[page.0 as usize] += 1;
        }
        let mut n_references = vec![0u32; arena.n_pages()];
        for sequence in &arena.sequences {
            assert!(pages_for(sequence.n_positions) <= sequence.pages.len());
            for page in &sequence.pages {
                n_references[page.0 as usize] += 1;
            }
        }
        assert_eq!(n_references, arena.n_references);
        for (free, references) in n_free.iter().zip(&n_references) {
            assert!((*free == 1) != (*references > 0) && *free <= 1);
        }
    }

    proptest! {
        #[test]
        fn pages_are_free_or_referenced_under_any_operations(
            operations in prop::collection::vec((0u8..3, 0u32..6, 0u32..6, 0usize..900), 1..120),
        ) {
            let mut arena = KvArena::new(12, 6);
            for (operation, a, b, n) in operations {
                let (a, b) = (SequenceId(a), SequenceId(b));
                match operation {
                    0 if arena.assign(a, arena.length(a) + n).is_ok() => arena.advance(a, n),
                    1 if a != b => {
                        arena.release(b);
                        let _ = arena.share(a, b);
                    }
                    2 => {
                        arena.release(a);
                    }
                    _ => {}
                }
                assert_consistent(&arena);
            }
            for id in 0..6 {
                arena.release(SequenceId(id));
            }
            prop_assert_eq!(arena.n_free(), 12);
        }
    }
}
