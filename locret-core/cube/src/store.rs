//! Dense units of all heads in two buffers of the device.

use crate::{
    kernels::units,
    place::{Place, element, made},
};
use burn::tensor::DType as TensorType;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};
use locret_core::{
    Compute, DType, Dense, Error, Fold, Growth, KeptUnits, KvStore, LayerSpec, Ops, Result, Room,
    Rows, TurnKeys, check_append, check_folds, check_retain, dense_name, folded,
};
use std::{
    any::Any,
    io::{Read, Take, Write},
    sync::Arc,
};

/// Units of a cube where each has one number to move.
const UNITS: u32 = 256;

/// Dense units of one layer: the rows of all heads, one head's behind the other's, in one buffer of keys and one
/// of values. Where there is room for new units they are put where they stay; forks share buffers until one of
/// them changes.
#[derive(Debug, Clone)]
pub(crate) struct CubeStore {
    place: Arc<Place>,
    layer: LayerSpec,
    dtype: DType,
    rooms: Vec<Room>,
    /// `[rows, head_dim]`
    pub(crate) keys: CubeTensor,
    pub(crate) values: CubeTensor,
    /// First row and number of units of each head, for kernels.
    pub(crate) bounds: CubeTensor,
}

/// Burn's name of a type that units are kept in.
pub(crate) fn float(dtype: DType) -> Option<TensorType> {
    match dtype {
        DType::F32 => Some(TensorType::F32),
        DType::F16 => Some(TensorType::F16),
        DType::BF16 => Some(TensorType::BF16),
        _ => None,
    }
}

impl CubeStore {
    /// An empty store; `None` for a type that the device does not have.
    pub(crate) fn new(place: &Arc<Place>, layer: &LayerSpec, dtype: DType) -> Option<Self> {
        let kept = float(dtype).filter(|kept| place.device.supports_dtype(*kept))?;
        let rooms = vec![Room::default(); layer.kv_heads];
        let empty = || place.empty([0, layer.head_dim], kept);
        Some(Self {
            keys: empty(),
            values: empty(),
            bounds: bounds(place, &rooms),
            place: place.clone(),
            layer: *layer,
            dtype,
            rooms,
        })
    }

    pub(crate) fn longest(&self) -> usize {
        self.rooms.iter().map(Room::rows).max().unwrap_or(0)
    }

    pub(crate) fn kind(&self) -> TensorType {
        self.keys.dtype
    }

    fn first(&self, head: usize) -> usize {
        self.rooms[..head].iter().map(Room::capacity).sum()
    }

    /// Whether nobody else has the buffers, so that they can be written to.
    fn own(&self) -> bool {
        self.keys.can_mut() && self.values.can_mut()
    }

    /// Copies units into buffers of `rooms`: those whose numbers are listed, one head's behind the other's, or all that
    /// there are.
    fn move_to(&mut self, rooms: &[Room], picked: Option<CubeTensor>) -> Result<()> {
        let (place, d) = (self.place.clone(), self.layer.head_dim);
        let rows: usize = rooms.iter().map(Room::capacity).sum();
        // Kernels count numbers in 32 bits.
        if rows
            .checked_mul(d)
            .is_none_or(|n| u32::try_from(n).is_err())
        {
            let found = format!("{rows} rows of {d}");
            return Err(Error::Device(format!(
                "units of a layer are too many for GPU kernels: {found}"
            )));
        }
        let [keys, values] = [(); 2].map(|()| place.empty([rows, d], self.kind()));
        let to = bounds(&place, rooms);
        let longest = rooms.iter().map(Room::rows).max().unwrap_or(0);
        if self.longest() > 0 && longest > 0 {
            let is_picked = picked.is_some();
            let from = picked.unwrap_or_else(|| place.empty([1], TensorType::U32));
            let cubes = (longest * d).div_ceil(UNITS as usize) as u32;
            units::copy::launch(
                &place.client,
                CubeCount::Static(cubes, rooms.len() as u32, 1),
                CubeDim::new_1d(UNITS),
                self.keys.clone().into_buffer_arg(),
                self.values.clone().into_buffer_arg(),
                self.bounds.clone().into_buffer_arg(),
                from.into_buffer_arg(),
                to.clone().into_buffer_arg(),
                keys.clone().into_buffer_arg(),
                values.clone().into_buffer_arg(),
                d,
                is_picked,
                element(self.kind()),
            );
        }
        (self.keys, self.values, self.bounds) = (keys, values, to);
        self.rooms = rooms.to_vec();
        Ok(())
    }

    /// One head's rows of keys or values, as new memory.
    fn part(&self, rows: &CubeTensor, head: usize) -> Rows {
        let (d, len) = (self.layer.head_dim, self.rooms[head].rows());
        if len == 0 {
            return burn::tensor::Tensor::zeros([0, d], &self.place.device).into();
        }
        let out = self.place.empty([len, d], TensorType::F32);
        let (count, dim) = elementwise(&self.place, len * d);
        units::read::launch(
            &self.place.client,
            count,
            dim,
            rows.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            self.first(head) as u32,
            d,
            element(self.kind()),
        );
        made(out)
    }

    /// Replaces one head's keys or values.
    fn fold(&mut self, keys: bool, head: usize, folds: &[Fold]) -> Result<()> {
        let d = self.layer.head_dim;
        check_folds(folds, self.rooms[head].rows())?;
        let rows = match keys {
            true => self.keys(head)?,
            false => self.values(head)?,
        };
        let mut all = rows.into_values()?;
        for (unit, mixed) in folded(folds, |unit| all[unit as usize * d..][..d].to_vec()) {
            all[unit as usize * d..][..d].copy_from_slice(&mixed);
        }
        self.replace(keys, head, &Rows::new(all, d, &self.place.device)?)
    }

    fn replace(&mut self, keys: bool, head: usize, by: &Rows) -> Result<()> {
        let (d, len) = (self.layer.head_dim, self.rooms[head].rows());
        by.expect("units that replace others", [len, d])?;
        if len == 0 {
            return Ok(());
        }
        if !self.own() {
            self.move_to(&self.rooms.clone(), None)?;
        }
        let (count, dim) = elementwise(&self.place, len * d);
        units::write::launch(
            &self.place.client,
            count,
            dim,
            self.place.rows(by)?.into_tensor_arg(),
            if keys { &self.keys } else { &self.values }
                .clone()
                .into_buffer_arg(),
            self.first(head) as u32,
            d,
            element(self.kind()),
        );
        Ok(())
    }

    /// A store of Burn's operations, which writes and reads files.
    fn plain(&self) -> Result<Box<dyn KvStore>> {
        Ops::new(&self.place.device).store(&self.layer, self.dtype)
    }

    /// The same units in such a store.
    fn as_plain(&self) -> Result<Box<dyn KvStore>> {
        let mut plain = self.plain()?;
        if self.is_empty() {
            return Ok(plain);
        }
        let (d, longest) = (self.layer.head_dim, self.longest());
        let width = d * self.rooms.len();
        let mut parts = [(); 2].map(|()| vec![0.0; longest * width]);
        for head in 0..self.rooms.len() {
            for (part, of) in parts.iter_mut().zip([&self.keys, &self.values]) {
                let rows = self.part(of, head).into_values()?;
                for (row, from) in rows.chunks(d).enumerate() {
                    part[row * width + head * d..][..d].copy_from_slice(from);
                }
            }
        }
        let [keys, values] = parts.map(|part| Rows::new(part, width, &self.place.device));
        plain.append(&keys?, &values?)?;
        let all = |room: &Room| (0..room.rows() as u32).collect();
        plain.retain(&self.rooms.iter().map(all).collect::<Vec<_>>())?;
        Ok(plain)
    }
}

/// First row and number of units of each head.
pub(crate) fn bounds(place: &Place, rooms: &[Room]) -> CubeTensor {
    let mut first = 0;
    let bounds = rooms.iter().flat_map(|room| {
        let of_head = [first, room.rows() as u32];
        first += room.capacity() as u32;
        of_head
    });
    place.indices(&bounds.collect::<Vec<u32>>())
}

/// Cubes and their units for a kernel of which each unit makes one number.
pub(crate) fn elementwise(place: &Place, numbers: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(UNITS);
    (
        calculate_cube_count_elemwise(&place.client, numbers, dim),
        dim,
    )
}

/// So many cubes, of which no axis has more than every device takes; there may be some too many.
pub(crate) fn spread(cubes: usize) -> CubeCount {
    let across = cubes.clamp(1, 1 << 15);
    CubeCount::Static(across as u32, cubes.div_ceil(across) as u32, 1)
}

impl KvStore for CubeStore {
    fn name(&self) -> String {
        dense_name(self.dtype)
    }

    fn append(&mut self, keys: &Rows, values: &Rows) -> Result<()> {
        let (d, heads) = (self.layer.head_dim, self.rooms.len());
        let t = check_append(keys, values, heads, d)?;
        if t == 0 {
            return Ok(());
        }
        let [keys, values] = [self.place.rows(keys)?, self.place.rows(values)?];
        let mut rooms = self.rooms.clone();
        rooms.iter_mut().for_each(|room| room.append(t));
        let grown =
            (rooms.iter().zip(&self.rooms)).any(|(new, old)| new.capacity() != old.capacity());
        if grown || !self.own() {
            self.move_to(&rooms, None)?;
        } else {
            self.bounds = bounds(&self.place, &rooms);
            self.rooms = rooms;
        }
        let (count, dim) = elementwise(&self.place, t * heads * d);
        units::append::launch(
            &self.place.client,
            count,
            dim,
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            self.bounds.clone().into_buffer_arg(),
            self.keys.clone().into_buffer_arg(),
            self.values.clone().into_buffer_arg(),
            d,
            element(self.kind()),
        );
        Ok(())
    }

    fn retain(&mut self, kept: &[Vec<u32>]) -> Result<()> {
        check_retain(kept, self.rooms.iter().map(Room::rows))?;
        let mut rooms = self.rooms.clone();
        for (room, list) in rooms.iter_mut().zip(kept) {
            if list.len() < room.rows() {
                room.retain(list.len());
            }
        }
        match rooms == self.rooms {
            true => Ok(()),
            false => {
                let kept = self.place.indices(&kept.concat());
                self.move_to(&rooms, Some(kept))
            }
        }
    }

    fn retain_listed(&mut self, kept: &KeptUnits) -> Result<()> {
        let units = kept.units().clone().try_into_primitive::<CubeBackend>();
        // Of what this crate's lists have chosen.
        let Some(units) = units.ok().filter(|units| units.dtype == TensorType::U32) else {
            return self.retain(&kept.read()?);
        };
        let mut rooms = self.rooms.clone();
        let fits = |(room, len): (&Room, &usize)| *len <= room.rows();
        if kept.lens().len() != rooms.len() || !rooms.iter().zip(kept.lens()).all(fits) {
            let have: Vec<usize> = rooms.iter().map(Room::rows).collect();
            return Err(Error::shape("units that stay", have, kept.lens()));
        }
        for (room, len) in rooms.iter_mut().zip(kept.lens()) {
            if *len < room.rows() {
                room.retain(*len);
            }
        }
        match rooms == self.rooms {
            true => Ok(()),
            false => self.move_to(&rooms, Some(units)),
        }
    }

    fn len(&self, head: usize) -> usize {
        self.rooms[head].rows()
    }

    fn is_empty(&self) -> bool {
        self.longest() == 0
    }

    fn bytes(&self) -> usize {
        let rows: usize = self.rooms.iter().map(Room::capacity).sum();
        2 * rows * self.layer.head_dim * self.dtype.block_bytes()
    }

    fn growth(&self) -> Box<dyn Growth> {
        Dense::growth(&self.layer, self.dtype.block_bytes())
    }

    fn keys(&self, head: usize) -> Result<Rows> {
        Ok(self.part(&self.keys, head))
    }

    fn values(&self, head: usize) -> Result<Rows> {
        Ok(self.part(&self.values, head))
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn turns_keys(&self) -> bool {
        self.dtype == DType::F32
    }

    fn turn_keys(&mut self, turn: &TurnKeys<'_>) -> Result<()> {
        if !self.turns_keys() {
            return Err(Error::NotSupported {
                operation: "turning keys",
                implementer: format!("the store {}", self.name()),
            });
        }
        for head in 0..self.rooms.len() {
            if self.len(head) > 0 {
                let turned = turn(head, self.keys(head)?)?;
                self.replace(true, head, &turned)?;
            }
        }
        Ok(())
    }

    fn fold_values(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.fold(false, head, folds)
    }

    fn folds_keys(&self) -> bool {
        true
    }

    fn fold_keys(&mut self, head: usize, folds: &[Fold]) -> Result<()> {
        self.fold(true, head, folds)
    }

    fn write(&self, to: &mut dyn Write) -> Result<()> {
        self.as_plain()?.write(to)
    }

    fn read(&mut self, from: &mut Take<&mut dyn Read>) -> Result<()> {
        let mut plain = self.plain()?;
        plain.read(from)?;
        let heads = self.rooms.len();
        let mut read = Self {
            rooms: vec![Room::default(); heads],
            ..self.clone()
        };
        let rooms: Vec<Room> = (0..heads)
            .map(|head| Room::exact(plain.len(head)))
            .collect();
        read.move_to(&rooms, None)?;
        for head in 0..heads {
            read.replace(true, head, &plain.keys(head)?)?;
            read.replace(false, head, &plain.values(head)?)?;
        }
        *self = read;
        Ok(())
    }

    fn fork(&self) -> Box<dyn KvStore> {
        Box::new(self.clone())
    }
}
