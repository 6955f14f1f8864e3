use proptest::prelude::*;

use super::*;

const WEIGHTS: u64 = 1_000_000;
const PAGE: u64 = 1000;
const RING: u64 = 300;

/// A backend whose bytes are easy to follow.
fn memory(shape: &EngineShape) -> BackendMemory {
    let n_sequences = (shape.n_slots + shape.n_forks) as u64;
    BackendMemory {
        weights_bytes: WEIGHTS,
        kv_bytes: shape.n_pages as u64 * PAGE + n_sequences * RING,
        workspace_bytes: 500 + shape.n_slots as u64 * 10 + shape.prefill_rows as u64,
    }
}

fn request(batch: BatchSize, total_bytes: u64) -> PlanRequest {
    PlanRequest {
        ledger: vec![
            LedgerEntry {
                class: "experts".to_owned(),
                scheme: "mxfp4".to_owned(),
                stored_bytes: 700_000,
                loaded_bytes: 700_000,
                lossless: Some(true),
                relative_error: None,
            },
            LedgerEntry {
                class: "attention".to_owned(),
                scheme: "mxint8".to_owned(),
                stored_bytes: 400_000,
                loaded_bytes: 300_000,
                lossless: Some(false),
                relative_error: Some(0.0123),
            },
        ],
        budget: Budget::given(total_bytes),
        batch,
        max_context: 2048,
        longest_prompt: 200,
        n_jobs: 1000,
        n_two_stage: 0,
        prefix_reuse: false,
        prefill_rows: 100,
        kv_scheme: "bf16",
        driver_bytes: 0,
    }
}

#[test]
fn a_roomy_budget_gives_every_slot_its_whole_context() -> Result<(), PlanError> {
    let plan = plan(&request(BatchSize::Auto, u64::MAX), memory)?;
    assert_eq!(plan.shape.n_slots, MAX_AUTO_SLOTS);
    assert_eq!(plan.shape.n_pages, 64 * 8);
    assert_eq!(plan.shape.n_pages, plan.full_pages);
    assert_eq!(plan.total_bytes, total(&memory(&plan.shape)));
    Ok(())
}

#[test]
fn slots_never_exceed_jobs() -> Result<(), PlanError> {
    for batch in [BatchSize::Auto, BatchSize::Slots(64)] {
        for (n_jobs, n_slots) in [(0, 1), (1, 1), (5, 5)] {
            let request = PlanRequest {
                n_jobs,
                prefix_reuse: true,
                ..request(batch, u64::MAX)
            };
            let shape = plan(&request, memory)?.shape;
            assert_eq!(shape.n_slots, n_slots);
            assert!(shape.n_forks < n_jobs.max(1));
        }
    }
    Ok(())
}

#[test]
fn every_slot_may_keep_the_prompt_of_a_row_of_two_stages() -> Result<(), PlanError> {
    let of = |n_two_stage| {
        let request = PlanRequest {
            n_jobs: 100,
            n_two_stage,
            prefix_reuse: true,
            ..request(BatchSize::Slots(32), u64::MAX)
        };
        plan(&request, memory)
    };
    let (plain, one, all) = (of(0)?, of(1)?, of(100)?);
    assert_eq!(one.shape.n_forks, plain.shape.n_forks + 1);
    assert_eq!(all.shape.n_forks, plain.shape.n_forks + 32);
    assert_eq!(
        all.memory.kv_bytes - plain.memory.kv_bytes,
        32 * (PAGE + RING)
    );
    Ok(())
}

#[test]
fn the_automatic_share_bounds_the_batch_but_not_a_single_row() -> Result<(), PlanError> {
    let with_share = |auto_batch_bytes| PlanRequest {
        budget: Budget {
            total_bytes: 100 * WEIGHTS,
            auto_batch_bytes: Some(auto_batch_bytes),
        },
        ..request(BatchSize::Auto, 0)
    };
    let plan_20k = plan(&with_share(20_000), memory)?;
    assert!(plan_20k.total_bytes <= WEIGHTS + 20_000);
    assert!((2..64).contains(&plan_20k.shape.n_slots));
    let single = plan(&with_share(10), memory)?;
    assert_eq!(single.shape.n_slots, 1);
    assert_eq!(single.shape.n_pages, 8, "one row at full context");
    Ok(())
}

#[test]
fn a_tight_budget_gives_fewer_pages_then_fewer_slots() -> Result<(), PlanError> {
    // 4 slots: at least 8 pages (two for each prompt and a page more), at most 32.
    let bytes = |n_pages| WEIGHTS + n_pages * PAGE + 4 * RING + 500 + 40 + 100;
    for n_pages in [8, 9, 20, 32] {
        let request = request(BatchSize::Slots(4), bytes(n_pages));
        let plan = plan(&request, memory)?;
        assert_eq!(
            (plan.shape.n_slots, plan.shape.n_pages),
            (4, n_pages as usize)
        );
    }
    let auto = plan(&request(BatchSize::Auto, bytes(8)), memory)?;
    assert_eq!(auto.shape.n_slots, 4);
    Ok(())
}

#[test]
fn a_fixed_batch_that_does_not_fit_names_what_does() {
    let n_slots = 32;
    let budget = WEIGHTS + 20_000;
    let Err(PlanError::BatchDoesNotFit {
        needed_bytes,
        budget_bytes,
        nearest,
        ..
    }) = plan(&request(BatchSize::Slots(n_slots), budget), memory)
    else {
        panic!("32 slots need 64 pages of {PAGE} bytes");
    };
    assert!(needed_bytes > budget_bytes);
    assert!(!nearest.is_empty());
    for fit in nearest {
        assert!(fit.needed_bytes <= budget);
        let request = PlanRequest {
            max_context: fit.max_context,
            ..request(BatchSize::Slots(fit.n_slots), budget)
        };
        let planned = plan(&request, memory).expect("it was offered as fitting");
        assert_eq!(planned.shape.n_slots, fit.n_slots);
    }
}

#[test]
fn errors_say_what_is_short_and_how_to_mend_it() {
    let Err(error) = plan(&request(BatchSize::Auto, WEIGHTS - 1), memory) else {
        panic!("the weights alone exceed the budget");
    };
    assert_eq!(
        error.to_string(),
        "the weights need 976.6 KiB, the budget is 976.6 KiB"
    );
    let error = plan(&request(BatchSize::Slots(4), WEIGHTS + 10), memory);
    let hint = error.expect_err("nothing fits in ten bytes").hint();
    assert!(hint.starts_with("no batch fits"), "{hint}");
    let error = plan(&request(BatchSize::Slots(32), WEIGHTS + 20_000), memory);
    let error = error.expect_err("32 slots do not fit");
    assert!(
        error.hint().contains("`--batch 8 --context 2048`"),
        "{}",
        error.hint()
    );
    assert!(matches!(
        plan(&request(BatchSize::Slots(0), u64::MAX), memory),
        Err(PlanError::Empty { .. })
    ));
    let no_context = PlanRequest {
        max_context: 0,
        ..request(BatchSize::Auto, u64::MAX)
    };
    assert!(matches!(
        plan(&no_context, memory),
        Err(PlanError::Empty { .. })
    ));
}

#[test]
fn the_table_shows_ledger_and_plan() -> Result<(), PlanError> {
    let request = PlanRequest {
        prefix_reuse: true,
        ..request(BatchSize::Slots(4), WEIGHTS + 25_000)
    };
    let text = plan(&request, memory)?.to_string();
    let expected = "\
weights    held as     stored     loaded  values
experts    mxfp4    683.6 KiB  683.6 KiB  exact
attention  mxint8   390.6 KiB  293.0 KiB  changed, error 1.23 %
total                 1.0 MiB  976.6 KiB

memory plan
weights       976.6 KiB
kv cache       23.7 KiB  bf16, 4 slots (given) + 7 shared prefixes x 2048 positions, 21 pages of the 39 \
that all slots at full context would take
workspace         640 B  prefill passes of 100 tokens
total        1000.9 KiB  budget 1001.0 KiB
";
    assert_eq!(text, expected);
    Ok(())
}

#[test]
fn bytes_are_readable() {
    for (bytes, text) in [
        (312, "312 B"),
        (2048, "2.0 KiB"),
        (640 << 20, "640.0 MiB"),
        (13_761_264_768, "12.82 GiB"),
    ] {
        assert_eq!(bytes_text(bytes), text);
    }
}

#[test]
fn the_grid_marks_what_does_not_fit() {
    let cells = grid(&[1, 16], &[512, 4096], 100, memory);
    assert_eq!(
        cells[1][1].total_bytes,
        WEIGHTS + 256 * PAGE + 16 * RING + 760
    );
    let text = grid_table(&cells, WEIGHTS + 50_000);
    let marked: Vec<bool> = text.lines().map(|line| line.contains('*')).collect();
    assert_eq!(marked, [false, false, true]);
}

#[test]
fn a_card_leaves_what_its_context_does_not_take() {
    let card = Card::named("A100-40").expect("it is listed");
    assert_eq!(bytes_text(card.total_bytes), "39.56 GiB");
    assert_eq!(bytes_text(card.usable_bytes()), "39.06 GiB");
    assert!(card.is_supported());
    assert!(!Card::named("t4-16").expect("listed").is_supported());
    assert!(Card::named("a100").is_none(), "there are two of that name");
}

#[test]
fn a_fit_counts_the_most_slots_and_says_when_there_are_none() {
    let roomy = fit("4bit", &[512, 2048], 100, WEIGHTS + 100_000, memory);
    assert!(roomy.fits);
    let slots: Vec<usize> = roomy.cells.iter().map(|cell| cell.n_slots).collect();
    // A slot takes 2 or 8 pages, a ring and 10 bytes of workspace beside 600 for all.
    assert_eq!(slots, [99_400 / 2310, 99_400 / 8310]);
    let tight = fit("4bit", &[512, 2048], 100, WEIGHTS + 2_000, memory);
    assert!(!tight.fits && tight.cells.iter().all(|cell| cell.n_slots == 0));
    assert_eq!(tight.least_bytes, WEIGHTS + 2 * PAGE + RING + 610);
    let text = fit_table(&[roomy, tight]);
    assert!(text.lines().nth(2).is_some_and(|line| line.contains("no")));
}

proptest! {
    #[test]
    fn any_plan_fits_its_budget_and_holds_a_row(
        extra in 0u64..200_000,
        share in proptest::option::of(0u64..100_000),
        n_slots in 1usize..100,
        auto: bool,
        prefix_reuse: bool,
        max_context in 1usize..5000,
        longest_prompt in 0usize..5000,
        n_jobs in 0usize..200,
    ) {
        let request = PlanRequest {
            budget: Budget { total_bytes: WEIGHTS + extra, auto_batch_bytes: share },
            max_context,
            longest_prompt,
            n_jobs,
            prefix_reuse,
            ..request(if auto { BatchSize::Auto } else { BatchSize::Slots(n_slots) }, 0)
        };
        match plan(&request, memory) {
            Ok(plan) => {
                prop_assert!(plan.total_bytes <= WEIGHTS + extra);
                prop_assert!(plan.shape.n_pages >= pages_for(max_context) + plan.shape.n_forks);
                prop_assert!(plan.shape.n_pages <= plan.full_pages);
                prop_assert!(plan.shape.n_slots <= n_jobs.max(1));
            }
            Err(PlanError::BatchDoesNotFit { needed_bytes, nearest, .. }) => {
                prop_assert!(needed_bytes > WEIGHTS + extra);
                for fit in nearest {
                    prop_assert!(fit.needed_bytes <= WEIGHTS + extra);
                    prop_assert!(fit.max_context <= max_context);
                }
            }
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }
}
