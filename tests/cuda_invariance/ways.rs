//! The ways in which the rows are run: slots, prefill passes, reuse, refill, neighbours, pages.

/// One way of running the rows.
#[derive(Clone, Copy)]
pub struct Way {
    pub name: &'static str,
    pub n_slots: usize,
    pub prefill_rows: usize,
    pub steps_per_call: usize,
    pub reuse: bool,
    pub refill: bool,
    pub poison: bool,
    /// Jobs are moved to every so many places: another order among equals, other neighbours.
    pub stride: usize,
    /// Short rows beside those that are looked at.
    pub n_mates: usize,
    pub n_pages: Option<usize>,
}

pub const WAY: Way = Way {
    name: "one row at a time",
    n_slots: 1,
    prefill_rows: 1000,
    steps_per_call: 4,
    reuse: false,
    refill: true,
    poison: false,
    stride: 1,
    n_mates: 0,
    n_pages: None,
};

/// The longest row's pages and two more: rows that pass a page's border together are evicted.
const FEW_PAGES: usize = 22;

pub const WAYS: [Way; 8] = [
    Way {
        name: "7 slots, passes of 64, memory of NaN",
        n_slots: 7,
        prefill_rows: 64,
        steps_per_call: 1,
        reuse: true,
        poison: true,
        ..WAY
    },
    Way {
        name: "8 slots, whole prompts, another order",
        n_slots: 8,
        prefill_rows: 16_384,
        steps_per_call: 16,
        reuse: true,
        stride: 17,
        ..WAY
    },
    Way {
        name: "9 slots without refill or reuse, memory of NaN",
        n_slots: 9,
        refill: false,
        poison: true,
        ..WAY
    },
    Way {
        name: "9 slots, too few pages, memory of NaN",
        n_slots: 9,
        reuse: true,
        poison: true,
        n_pages: Some(FEW_PAGES),
        ..WAY
    },
    Way {
        name: "64 slots among short rows",
        n_slots: 64,
        prefill_rows: 16_384,
        steps_per_call: 16,
        reuse: true,
        stride: 7,
        n_mates: 150,
        ..WAY
    },
    Way {
        name: "256 slots among short rows, memory of NaN",
        n_slots: 256,
        reuse: true,
        poison: true,
        stride: 29,
        n_mates: 230,
        ..WAY
    },
    Way {
        name: "256 slots without reuse, passes of 64",
        n_slots: 256,
        prefill_rows: 64,
        steps_per_call: 8,
        n_mates: 230,
        ..WAY
    },
    Way {
        name: "256 slots, whole prompts, memory of NaN",
        n_slots: 256,
        prefill_rows: 16_384,
        poison: true,
        stride: 3,
        n_mates: 230,
        ..WAY
    },
];
