//! What works with an agent as it does without.

use tierkeep::{begin::Begin, checkpointer::Checkpointer, save::Level, tier::TierKind};

use crate::{
    common::{
        Model, Places, SIZES, close, events, files, read_whole, resume, settings, train, wait,
    },
    world::{Hosted, far},
};

#[test]
fn what_is_saved_through_an_agent_comes_back_through_it_and_without_it() {
    let places = Places::new();
    let hosted = Hosted::new(settings(places.ram()));
    let ckpt = Checkpointer::open(far(&places.destination(), places.ram(), 0, 1)).unwrap();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 0);
    ckpt.prepare(&Model::new(0, &SIZES).state(0).tensors).unwrap();
    train(&ckpt, &SIZES, 1..=5);
    let reader = tierkeep::reader::Reader::of(ckpt.tiers());
    assert_eq!(reader.steps().unwrap().last().unwrap().key.step.0, 5);
    // A rollback in the running process.
    let how = Begin { rollback: true, ..Begin::default() };
    let wish = tierkeep::restore::decide::Wish { step: Some(tierkeep::names::Step(4)), ..how.wish };
    let found = ckpt.begin(&Begin { wish, ..how }).unwrap().unwrap();
    read_whole(&found, &SIZES).unwrap();
    assert_eq!(found.step().0, 4);
    train(&ckpt, &SIZES, 5..=6);
    close(&ckpt);
    assert_eq!(events(&ckpt), [""; 0]);
    // Durable elsewhere, and closed: the memory went back.
    assert_eq!(
        files(places.ram())
            .iter()
            .filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
            .count(),
        0
    );
    // The agent's rank is free for a trainer of its own, and the other way round.
    let own = places.open();
    assert_eq!(resume(&own, &SIZES).unwrap(), 6);
    train(&own, &SIZES, [7]);
    close(&own);
    let ckpt = Checkpointer::open(far(&places.destination(), places.ram(), 0, 1)).unwrap();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 7);
    close(&ckpt);
    drop(hosted);
}

#[test]
fn a_damaged_copy_is_mended_by_the_agent() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let open = || Checkpointer::open(far(&places.destination(), places.ram(), 0, 1)).unwrap();
    let ckpt = open();
    resume(&ckpt, &SIZES).unwrap();
    let model = Model::at(0, &SIZES, 1);
    wait(&model.save(&ckpt, 1).unwrap(), Level::Disk);
    drop(ckpt);
    let payload = |root: &std::path::Path| {
        let is = |f: &std::path::PathBuf| f.extension().is_some_and(|e| e == "safetensors");
        root.join(files(root).into_iter().find(is).unwrap())
    };
    crate::common::flip(&payload(places.ram()), 8_000_001);
    let ckpt = open();
    let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
    let report = read_whole(&found, &SIZES).unwrap();
    assert_eq!((report.damaged.len(), report.tier), (1, TierKind::Ram), "{report:?}");
    crate::world::until("it is mended", || {
        events(&ckpt).iter().any(|e| e.starts_with("repaired: step 1: the copy in the ram tier"))
    });
    assert!(crate::common::verify_all(&places).is_empty());
    close(&ckpt);
}
