//! What a backend tells of the routing, for statistics.

use super::*;

#[test]
fn the_routing_of_every_layer_is_kept_where_it_is_asked_for() {
    let mut backend = backend(false);
    map_pages(&mut backend, 0);
    let (n_layers, n_experts, k) = {
        let config = backend.config();
        let n_layers = config.layers.len();
        (n_layers, config.n_experts, config.n_experts_per_token)
    };
    let tokens = prompt(3, 15);
    backend
        .prefill(&[span(0, 0, &tokens[..9])])
        .expect("it runs");
    assert!(backend.routed().is_empty(), "nobody asked");

    backend.keep_routing(true);
    backend
        .prefill(&[span(0, 9, &tokens[9..14])])
        .expect("it runs");
    // The last layer of a prefill ends with its keys and values.
    assert_eq!(backend.routed().len(), n_layers - 1);
    backend.start(&start(0, &tokens, 1)).expect("it starts");
    backend.decode(1).expect("it runs");
    events(&mut backend);
    assert_eq!(backend.routed().len(), n_layers, "of the latest pass alone");
    for experts in backend.routed() {
        let mut chosen = experts.clone();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen.len(), k, "a row takes so many: {experts:?}");
        assert!(chosen.iter().all(|&expert| (expert as usize) < n_experts));
    }

    backend.keep_routing(false);
    assert!(backend.routed().is_empty());
}
