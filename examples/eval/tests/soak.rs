//! A soak, short: in a process of its own, since memory is everybody's.

use locret_eval::soak::{BUDGET, batch, positions, scores};

#[test]
fn a_long_session_and_a_busy_batch_end_as_their_oracles() {
    assert_eq!(scores(6_000).unwrap().compared, 2 * 2 * BUDGET);
    let turned = positions(6_000).unwrap();
    assert_eq!(turned.compared, BUDGET);
    let busy = batch(200).unwrap();
    assert!(busy.compared >= 3, "{busy:?}");
}
