use super::*;
use crate::engine::sample::logits_hash;

fn backend() -> ScriptedBackend {
    let shape = EngineShape {
        n_slots: 2,
        n_forks: 1,
        n_pages: 4,
        max_context: 600,
        prefill_rows: 64,
    };
    let answers = HashMap::from([(vec![1, 2, 3], vec![7, 8])]);
    ScriptedBackend::new(shape, 10, answers, vec![5])
}

fn span(sequence: u32, start: usize, tokens: &[TokenId]) -> Span {
    Span {
        sequence: SequenceId(sequence),
        start,
        tokens: tokens.into(),
    }
}

fn start(slot: u32, token: TokenId, position: usize) -> SlotStart {
    SlotStart {
        slot: SequenceId(slot),
        token,
        position,
        sampling: Default::default(),
        row_hash: 1,
        sample: 0,
        stop_tokens: [9].into(),
        max_new_tokens: 10,
    }
}

#[test]
fn answers_its_table_then_stops() -> Result<(), EngineError> {
    let mut backend = backend();
    backend.map_page(SequenceId(0), 0, PageId(3));
    backend.prefill(&[span(0, 0, &[1, 2])])?;
    backend.start(&start(0, 3, 2))?;
    backend.decode(5)?;
    let mut events = Vec::new();
    while !backend.poll(&mut events)? {}
    let got: Vec<_> = events
        .iter()
        .map(|e| (e.position, e.token, e.stop))
        .collect();
    assert_eq!(
        got,
        [(3, 7, None), (4, 8, None), (5, 9, Some(StopReason::Stop))]
    );
    Ok(())
}

#[test]
#[should_panic(expected = "has no page")]
fn a_write_without_a_page_panics() {
    let _ = backend().prefill(&[span(0, 0, &[1])]);
}

#[test]
#[should_panic(expected = "while others hold it")]
fn a_write_into_a_shared_page_panics() {
    let mut backend = backend();
    backend.map_page(SequenceId(0), 0, PageId(0));
    backend.map_page(SequenceId(1), 0, PageId(0));
    let _ = backend.prefill(&[span(0, 0, &[1])]);
}

#[test]
#[should_panic(expected = "a span goes on")]
fn a_span_with_a_gap_panics() {
    let mut backend = backend();
    backend.map_page(SequenceId(0), 0, PageId(0));
    let _ = backend.prefill(&[span(0, 1, &[1])]);
}

#[test]
#[should_panic(expected = "the tail is the pair of last pages")]
fn a_fork_without_its_tail_panics() {
    let mut backend = backend();
    backend.map_page(SequenceId(0), 0, PageId(0));
    let _ = backend.prefill(&[span(0, 0, &[1])]);
    backend.map_page(SequenceId(1), 0, PageId(1));
    let _ = backend.fork(&Fork {
        from: SequenceId(0),
        to: SequenceId(1),
        n_positions: 1,
        tail: None,
    });
}

#[test]
fn injected_failures_come_after_the_steps_before_them() -> Result<(), EngineError> {
    let mut backend = backend();
    backend.inject_not_finite(1, 4, 1);
    backend.map_page(SequenceId(0), 0, PageId(3));
    backend.prefill(&[span(0, 0, &[1, 2])])?;
    backend.start(&start(0, 3, 2))?;
    backend.decode(2)?;
    let mut events = Vec::new();
    assert!(!backend.poll(&mut events)?);
    assert_eq!(events.len(), 1);
    assert!(matches!(
        backend.poll(&mut events),
        Err(EngineError::NotFinite {
            slot: 0,
            position: 4
        })
    ));
    Ok(())
}

#[test]
fn scores_depend_on_the_context() -> Result<(), EngineError> {
    let mut backend = backend();
    let mut hashes = Vec::new();
    backend.map_page(SequenceId(0), 0, PageId(0));
    backend.score(&span(0, 0, &[1, 2, 2]), &mut |position, logits| {
        hashes.push((position, logits_hash(logits)));
    })?;
    assert_eq!(hashes.len(), 3);
    assert_ne!(hashes[1].1, hashes[2].1);
    Ok(())
}
