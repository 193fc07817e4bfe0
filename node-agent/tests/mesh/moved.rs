//! An agent that begins anew at another address, as a pod that is replaced does.

use std::{collections::BTreeMap, net::TcpListener, sync::mpsc, time::Duration};

use tierkeep::peers::Network;
use tierkeep_agent::cluster::{Cluster, Key, Settings};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::world::{Agent, PATIENCE};

#[test]
fn a_question_on_its_way_to_an_agent_that_begins_anew_elsewhere_is_asked_there() {
    let a = Agent::start("a", &[], None);
    // Its first life lets connections in and says nothing, as an address that nobody has any more.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = silent.local_addr().unwrap();
    let settings = Settings {
        name: "b".into(),
        cluster: "test".into(),
        key: Key::new(b"key"),
        listen: at,
        advertise: at,
        seeds: vec![a.at.to_string()],
        labels: BTreeMap::new(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let first = runtime.block_on(Cluster::join(settings, BTreeMap::new())).unwrap();
    a.sees(&["a", "b"]);
    let (told, answer) = mpsc::channel();
    let mesh = a.mesh.clone();
    std::thread::spawn(move || {
        let site = wire::Site { destination: b"/nowhere/run".into(), ..Default::default() };
        let ask = Some(Ask::WhoLeads(wire::WhoLeads {}));
        let request = wire::Request { from: "a".into(), site: Some(site), ask };
        let _ = told.send(mesh.ask("b", request, Duration::from_secs(600)));
    });
    assert!(answer.recv_timeout(Duration::from_millis(500)).is_err(), "who answered?");
    drop((first, runtime));
    let b = Agent::start("b", &[a.at], None);
    let reply = answer.recv_timeout(PATIENCE).expect("it is asked at its new address").unwrap();
    assert!(matches!(reply.answer, Some(Answer::Failure(_) | Answer::Led(_))), "{reply:?}");
    drop(b);
}
