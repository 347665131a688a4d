//! Runs the checker over a configuration.

use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use crate::check::Action;
use crate::config::Config;
use crate::state::State;

/// What came of it.
pub struct Outcome {
    /// States generated, and how many of them were different.
    pub generated: usize,
    pub states: usize,
    pub depth: usize,
    pub time: Duration,
    /// The properties that do not hold, and how it comes to that.
    pub broken: Vec<(&'static str, Trace)>,
    /// What should be reached and was not.
    pub unreached: Vec<&'static str>,
    /// All states were seen; not if something was found to be broken.
    pub exhausted: bool,
}

/// What happened, one after the other, and the state that it led to.
pub struct Trace {
    pub actions: Vec<Action>,
    pub last: State,
}

/// Checks a configuration breadth first: all of its states, or until a property is found not to hold.
pub fn run(config: &Config, threads: usize, depth: Option<usize>) -> Outcome {
    let begun = Instant::now();
    let mut builder = config.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures);
    if let Some(depth) = depth {
        builder = builder.target_max_depth(depth);
    }
    let checker = builder.spawn_bfs().join();
    let mut found = checker.discoveries();
    let (mut broken, mut unreached) = (Vec::new(), Vec::new());
    for property in config.properties() {
        let path = found.remove(property.name);
        match (property.expectation, path) {
            (Expectation::Sometimes, None) => unreached.push(property.name),
            (Expectation::Sometimes, Some(_)) | (_, None) => {}
            (_, Some(path)) => {
                let (states, actions): (Vec<_>, Vec<_>) = path.into_vec().into_iter().unzip();
                let last = states.into_iter().next_back().expect("a path has states");
                broken.push((property.name, Trace { actions: actions.into_iter().flatten().collect(), last }));
            }
        }
    }
    Outcome {
        generated: checker.state_count(),
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        time: begun.elapsed(),
        exhausted: broken.is_empty() && depth.is_none(),
        broken,
        unreached,
    }
}
