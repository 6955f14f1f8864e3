//! Sequences that share pages have the bits that they have alone.

use super::*;

/// Rows that begin with a prefix: every third with `n_short` tokens of it, the others with `n_long`.
struct Sharing {
    n_short: usize,
    n_long: usize,
}

impl Sharing {
    const N_ROWS: usize = 17;
    const N_STEPS: usize = 12;
    /// Pages of a sequence, when it has its own alone.
    const N_PAGES: usize = 4;
    const SHAPE: EngineShape = EngineShape {
        n_slots: Self::N_ROWS,
        n_forks: 2,
        n_pages: (Self::N_ROWS + 2) * Self::N_PAGES,
        max_context: Self::N_PAGES * PAGE_POSITIONS,
        prefill_rows: 48,
    };

    fn open(path: CpuPath, exact: bool, n_threads: usize) -> CpuBackend {
        let options = CpuOptions {
            n_threads,
            ..options(exact)
        };
        let opened =
            CpuBackend::open_on(path, &checkpoint(), Precision::Stored, Self::SHAPE, options);
        opened.expect("it opens")
    }

    fn n_shared(&self, row: usize) -> usize {
        if row.is_multiple_of(3) {
            self.n_short
        } else {
            self.n_long
        }
    }

    fn prompt(&self, row: usize) -> Vec<TokenId> {
        let mut tokens = prompt(100, self.n_long);
        tokens.truncate(self.n_shared(row));
        tokens.extend(prompt(200 + row as u64, 2 + 7 * row));
        tokens
    }

    /// Maps pages to an empty sequence: those that are whole in the first `n_positions` of `from`,
    /// then its own.
    fn map(backend: &mut CpuBackend, from: Option<usize>, to: usize, n_positions: usize) {
        let page =
            |sequence: usize, index: usize| PageId((sequence * Self::N_PAGES + index) as u32);
        let id = |sequence: usize| SequenceId(sequence as u32);
        let n_whole = n_positions / PAGE_POSITIONS;
        for index in 0..Self::N_PAGES {
            let of = from.filter(|_| index < n_whole).unwrap_or(to);
            // The longer fork has the shorter one's pages in turn.
            let entry = of * backend.work.max_pages + index;
            let mapped = match of == to {
                true => page(to, index),
                false => PageId(backend.work.page_table[entry]),
            };
            backend.map_page(id(to), index, mapped);
        }
        let Some(from) = from else {
            return;
        };
        let tail = !n_positions.is_multiple_of(PAGE_POSITIONS);
        let tail = tail.then(|| (page(from, n_whole), page(to, n_whole)));
        let fork = Fork {
            from: id(from),
            to: id(to),
            n_positions,
            tail,
        };
        backend.fork(&fork).expect("a fork");
    }

    fn decode(&self, backend: &mut CpuBackend, rows: std::ops::Range<usize>) -> Traces {
        for row in rows.clone() {
            let start = start(row as u32, &self.prompt(row), Self::N_STEPS);
            backend.start(&start).expect("start");
        }
        backend.decode(Self::N_STEPS).expect("steps");
        let mut traces = vec![Vec::new(); rows.len()];
        for event in events(backend) {
            let hash = event.logits_hash.expect("asked for");
            let token = (event.token, event.logprob.to_bits(), hash);
            traces[event.slot.0 as usize - rows.start].push(token);
        }
        assert!(traces.iter().all(|trace| trace.len() == Self::N_STEPS));
        backend.clear(&rows.map(|row| SequenceId(row as u32)).collect::<Vec<_>>());
        traces
    }

    /// Each row by itself, in pages of its own.
    fn alone(&self, backend: &mut CpuBackend) -> Traces {
        let of_row = |row: usize| {
            Self::map(backend, None, row, 0);
            let tokens = self.prompt(row);
            let span = span(row as u32, 0, &tokens[..tokens.len() - 1]);
            backend.prefill(&[span]).expect("prefill");
            self.decode(backend, row..row + 1).remove(0)
        };
        (0..Self::N_ROWS).map(of_row).collect()
    }

    /// Makes the forks that rows share pages with.
    fn make_forks(&self, backend: &mut CpuBackend) {
        let (short, long) = (Self::N_ROWS, Self::N_ROWS + 1);
        let tokens = prompt(100, self.n_long);
        let (head, rest) = tokens.split_at(self.n_short);
        Self::map(backend, None, short, 0);
        backend
            .prefill(&[span(short as u32, 0, head)])
            .expect("prefill");
        Self::map(backend, Some(short), long, self.n_short);
        backend
            .prefill(&[span(long as u32, self.n_short, rest)])
            .expect("prefill");
    }

    /// The first `n_rows` rows together, in the forks' pages and their own.
    fn together(&self, backend: &mut CpuBackend, n_rows: usize) -> Traces {
        let mut spans = Vec::new();
        for row in 0..n_rows {
            let fork = Self::N_ROWS + usize::from(!row.is_multiple_of(3));
            let n_shared = self.n_shared(row);
            Self::map(backend, Some(fork), row, n_shared);
            let tokens = self.prompt(row);
            let rest = &tokens[n_shared..tokens.len() - 1];
            spans.push(span(row as u32, n_shared, rest));
        }
        backend.prefill(&spans).expect("prefill");
        self.decode(backend, 0..n_rows)
    }
}

#[test]
fn shared_pages_change_no_bit() {
    let cases = [(256, 256), (552, 552), (256, 600), (300, 510), (40, 512)];
    for exact in [true, false] {
        let mut firsts: [Vec<Traces>; 2] = Default::default();
        // The fastest first, for it does most.
        for path in paths().into_iter().rev() {
            let alone = &mut firsts[usize::from(path.gives_common_bits(exact))];
            for (case, &(n_short, n_long)) in cases.iter().enumerate() {
                let sharing = Sharing { n_short, n_long };
                if alone.len() == case {
                    alone.push(sharing.alone(&mut Sharing::open(path, exact, 2)));
                }
                let mut backend = Sharing::open(path, exact, 1 + case % 3);
                sharing.make_forks(&mut backend);
                for n_rows in [1, 2, 8, 9, 17] {
                    let traces = sharing.together(&mut backend, n_rows);
                    let name = format!("{path:?}, {n_short} and {n_long}, {n_rows} rows");
                    assert_eq!(alone[case][..n_rows], traces, "{name}");
                }
            }
        }
    }
}
