//! Every state of every configuration.

use model::{CONFIGS, run};

#[test]
fn every_configuration_holds_in_all_its_states() {
    let mut states = 0;
    for config in CONFIGS {
        let outcome = run(config, 2, None);
        println!("{}: {} states, depth {}, {:?}", config.name, outcome.states, outcome.depth, outcome.time);
        if let Some((property, trace)) = outcome.broken.first() {
            panic!("{}: {property}: {:#?}\n{:?}", config.name, trace.actions, trace.last);
        }
        assert!(outcome.unreached.is_empty(), "{} never reaches {:?}", config.name, outcome.unreached);
        assert!(outcome.exhausted);
        states += outcome.states;
    }
    println!("{states} states");
}
